"""The methods of adaptation by name."""

from collections.abc import Callable, Mapping
from typing import Any

from eckart.errors import EckartError
from eckart.methods.adapt.allora import allora
from eckart.methods.adapt.combining import COMBINATIONS
from eckart.methods.adapt.corda import corda
from eckart.methods.adapt.dora import dora
from eckart.methods.adapt.eva import eva
from eckart.methods.adapt.fedsvd import fedsvd
from eckart.methods.adapt.ffa_lora import ffa_lora
from eckart.methods.adapt.flora import flora
from eckart.methods.adapt.flylora import flylora
from eckart.methods.adapt.hira import hira
from eckart.methods.adapt.hra import hra
from eckart.methods.adapt.ia3 import ia3
from eckart.methods.adapt.incremental import incremental
from eckart.methods.adapt.lift import lift
from eckart.methods.adapt.loha import loha
from eckart.methods.adapt.lokr import lokr
from eckart.methods.adapt.lora import lora
from eckart.methods.adapt.lora_plus import lora_plus
from eckart.methods.adapt.lora_pro import lora_pro
from eckart.methods.adapt.lora_sb import lora_sb
from eckart.methods.adapt.lora_xs import lora_xs
from eckart.methods.adapt.lors import lors
from eckart.methods.adapt.miss import miss
from eckart.methods.adapt.mps import mps
from eckart.methods.adapt.oft import oft
from eckart.methods.adapt.olora import olora
from eckart.methods.adapt.pissa import pissa
from eckart.methods.adapt.recipe import Recipe
from eckart.methods.adapt.rslora import rslora
from eckart.methods.adapt.s2ft import s2ft
from eckart.methods.adapt.sara import sara
from eckart.methods.adapt.snella import snella
from eckart.methods.adapt.soka import soka
from eckart.methods.adapt.sorsa import sorsa
from eckart.methods.adapt.sparselora import sparselora
from eckart.methods.adapt.spectralft import spectralft
from eckart.methods.adapt.spp import spp
from eckart.methods.adapt.sqft import sqft
from eckart.methods.adapt.svfit import svfit
from eckart.methods.adapt.switchlora import switchlora
from eckart.methods.adapt.tlora import tlora
from eckart.methods.adapt.vera import vera
from eckart.methods.pages import Setting, check_settings, first_line, page_named, signature_of, text_of

Page = Callable[..., Recipe]

# In the order in which each refines an earlier one.
ADAPTERS: dict[str, Page] = {
    "lora": lora,
    "rslora": rslora,
    "lora+": lora_plus,
    "dora": dora,
    "pissa": pissa,
    "olora": olora,
    "corda": corda,
    "eva": eva,
    "lora-xs": lora_xs,
    "lora-sb": lora_sb,
    "lora-pro": lora_pro,
    "allora": allora,
    "switchlora": switchlora,
    "svfit": svfit,
    "sorsa": sorsa,
    "soka": soka,
    "miss": miss,
    "hra": hra,
    "oft": oft,
    "sara": sara,
    "lift": lift,
    "s2ft": s2ft,
    "spp": spp,
    "lors": lors,
    "sqft": sqft,
    "snella": snella,
    "flylora": flylora,
    "spectralft": spectralft,
    "flora": flora,
    "mps": mps,
    "tlora": tlora,
    "sparselora": sparselora,
    "vera": vera,
    "ia3": ia3,
    "loha": loha,
    "lokr": lokr,
    "hira": hira,
    "ffa-lora": ffa_lora,
    "fedsvd": fedsvd,
    "incremental": incremental,
}


# What is described: the methods, and the ways to combine adapters.
PAGES: dict[str, Callable[..., Any]] = {**ADAPTERS, **COMBINATIONS}


def adapter_settings(method: str) -> dict[str, Setting]:
    """Return the settings of a method by name.

    Raises:
        EckartError: for an unknown method, with the nearest names.
    """
    return signature_of(page_named(PAGES, method))


def adapter_recipe(method: str, settings: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a method with some settings changed.

    Raises:
        EckartError: for an unknown method or setting (with the nearest names), or a value of the wrong type or range.
    """
    require_adapter(method)
    check_settings(method, adapter_settings(method), settings)
    return ADAPTERS[method](**settings)


def require_adapter(method: str) -> None:
    """Raise an `EckartError` for a name that is no method's, with the nearest names."""
    if method in COMBINATIONS:
        raise EckartError(f"{method} combines adapters that are there; call eckart.adapters(model).combine(...)")
    page_named(ADAPTERS, method)


def adapter_summary(method: str) -> str:
    """Return the first line of a method's docstring."""
    return first_line(page_named(PAGES, method))


def adapter_source(method: str) -> str:
    """Return the docstring of a method's page: formula, structure and source."""
    return text_of(page_named(PAGES, method))
