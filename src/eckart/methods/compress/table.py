"""The compression methods by name, and how their settings are read from their signatures."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from eckart.methods.compress.aa_svd import aa_svd
from eckart.methods.compress.acip import acip
from eckart.methods.compress.afm import afm
from eckart.methods.compress.any4 import any4
from eckart.methods.compress.asvd import asvd
from eckart.methods.compress.basis_sharing import basis_sharing
from eckart.methods.compress.compot import compot
from eckart.methods.compress.concatenated_svd import concatenated_svd
from eckart.methods.compress.cospadi import cospadi
from eckart.methods.compress.dobi_svd import dobi_svd
from eckart.methods.compress.eckart import eckart
from eckart.methods.compress.eckart_mixed import eckart_mixed
from eckart.methods.compress.fusegpt import fusegpt
from eckart.methods.compress.fwsvd import fwsvd
from eckart.methods.compress.gptq import gptq
from eckart.methods.compress.kfac import kfac
from eckart.methods.compress.lord import lord
from eckart.methods.compress.lrq import lrq
from eckart.methods.compress.maestro import maestro
from eckart.methods.compress.modegpt import modegpt
from eckart.methods.compress.oats import oats
from eckart.methods.compress.pela import pela
from eckart.methods.compress.recipe import COMMON, Recipe, overridden
from eckart.methods.compress.rocket import rocket
from eckart.methods.compress.rtn import rtn
from eckart.methods.compress.shortgpt import shortgpt
from eckart.methods.compress.slicegpt import slicegpt
from eckart.methods.compress.svd import svd
from eckart.methods.compress.svd_llm import svd_llm
from eckart.methods.compress.svd_llm_v2 import svd_llm_v2
from eckart.methods.compress.trp import trp
from eckart.methods.compress.welore import welore
from eckart.methods.compress.zs_svd import zs_svd
from eckart.methods.pages import Setting, check_settings, first_line, page_named, signature_of, text_of

Page = Callable[..., Recipe]

# In the order in which each refines an earlier one.
METHODS: dict[str, Page] = {
    "svd": svd,
    "fwsvd": fwsvd,
    "asvd": asvd,
    "svd-llm": svd_llm,
    "svd-llm-v2": svd_llm_v2,
    "afm": afm,
    "lord": lord,
    "welore": welore,
    "kfac": kfac,
    "aa-svd": aa_svd,
    "basis-sharing": basis_sharing,
    "concatenated-svd": concatenated_svd,
    "zs-svd": zs_svd,
    "cospadi": cospadi,
    "compot": compot,
    "rocket": rocket,
    "oats": oats,
    "rtn": rtn,
    "gptq": gptq,
    "any4": any4,
    "lrq": lrq,
    "modegpt": modegpt,
    "slicegpt": slicegpt,
    "shortgpt": shortgpt,
    "fusegpt": fusegpt,
    "eckart": eckart,
    "eckart-mixed": eckart_mixed,
    # These train the whole model.
    "trp": trp,
    "pela": pela,
    "maestro": maestro,
    "acip": acip,
    "dobi-svd": dobi_svd,
}


def settings_of(method: str) -> dict[str, Setting]:
    """Return the settings of a method by name: its own, then those common to all.

    Raises:
        EckartError: for an unknown method, with the nearest names.
    """
    page = page_of(method)
    own = signature_of(page)
    recipe, types = page(), get_type_hints(Recipe)
    common = {name: Setting(name, types[name], getattr(recipe, name), True) for name in COMMON}
    return {**own, **common}


def page_of(method: str) -> Page:
    """Return the function of a method.

    Raises:
        EckartError: for an unknown method, with the nearest names.
    """
    return page_named(METHODS, method)


def recipe_of(method: str, settings: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of a method with some settings changed.

    Args:
        method: its name.
        settings: typed values by setting name.

    Raises:
        EckartError: for an unknown method or setting (with the nearest names), or a value of the wrong type or range.
    """
    known = settings_of(method)
    given = dict(settings or {})
    check_settings(method, known, given)
    own = {name: value for name, value in given.items() if not known[name].common}
    common = {name: value for name, value in given.items() if known[name].common}
    return overridden(page_of(method)(**own), **common)


def summary_of(method: str) -> str:
    """Return the first line of a method's docstring."""
    return first_line(page_of(method))


def source_of(method: str) -> str:
    """Return the docstring of a method's page: formula, answers and source."""
    return text_of(page_of(method))


assert all(name in {f.name for f in fields(Recipe)} for name in COMMON)
