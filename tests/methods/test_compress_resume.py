"""Runs killed by SIGKILL anywhere and started again end in the bytes of a run that was not; so do runs on a full disk.

All runs are forks of one fresh process that has computed nothing yet, so that its imports are paid for once.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

FORKS = """
import json, os, resource, signal, sys, traceback
import torch
torch.set_num_threads(1)
import eckart
eckart.compress, eckart.EckartError
import transformers.models.llama.modeling_llama
import eckart.atomic


def child(run):
    os.environ["ECKART_CACHE"] = run["cache"]
    stages, die = [], lambda: os.kill(os.getpid(), signal.SIGKILL)

    def progress(stage, done, total):
        stages.append([stage, done, total])
        if [stage, done] == run.get("kill"):
            die()

    if run.get("kill_in_file"):
        save, count = eckart.atomic.save_file, [0]

        def half(tensors, path, metadata=None):
            save(tensors, path, metadata=metadata)
            count[0] += 1
            if count[0] == run["kill_in_file"]:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        eckart.atomic.save_file = half
    if run.get("largest_file"):
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (run["largest_file"], unlimited[1]))
    answer = {}
    try:
        eckart.compress(run["model"], run["out"], progress=progress, **run["arguments"])
    except eckart.EckartError as error:
        answer["error"] = str(error)
    except Exception:
        answer["crash"] = traceback.format_exc()
    if run.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    with open(run["answer"], "w") as file:
        json.dump(answer | {"stages": stages}, file)


for run in json.load(open(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        child(run)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    folder = os.path.dirname(run["out"])
    json.dump({"status": status, "left": sorted(os.listdir(folder))}, open(run["answer"] + ".status", "w"))
"""


@dataclass
class Case:
    """A method, and where its first run ends: at a step, in the n-th file it writes, or where files are too large."""

    method: str
    kill: list | None = None
    kill_in_file: int | None = None
    largest_file: int | None = None

    @property
    def name(self) -> str:
        if self.kill:
            return "-".join(map(str, [self.method, *self.kill]))
        return f"{self.method}-file-{self.kill_in_file}" if self.kill_in_file else f"{self.method}-{self.largest_file}"


SETTINGS = {
    "aa-svd": {"heal": 1},
    "acip": {"steps": 60, "tune": 60, "batch": 1},
    "zs-svd": {"corrections": 2},
    "fusegpt": {"epochs": 60},  # of one batch
    "lora": {"heal": 60, "heal_kind": "lora"},
    "neurons": {"iterations": 1, "neurons": "always"},
    "coded-units": {"bits": 4},
    "coded-slices": {"bits": 4},
    "coded-blocks": {"bits": 4, "epochs": 60},
    "coded-basis": {"bits": 4},
    "coded-elastic": {"bits": 4, "storage": "lowrank"},
}
OTHERS = {
    "neurons": {"method": "eckart-mixed", "keep": 0.2},
    "elastic": {"method": "eckart", "elastic": True},
    "lora": {"method": "svd"},
    "coded-units": {"method": "modegpt"},
    "coded-slices": {"method": "slicegpt"},
    "coded-blocks": {"method": "fusegpt"},
    "coded-basis": {"method": "basis-sharing"},
    "coded-elastic": {"method": "eckart", "elastic": True},
}
KILLED = [
    Case("eckart", ["forward", 0]),
    Case("eckart", ["forward", 3]),
    Case("eckart", ["backward", 3]),
    Case("eckart", ["plan", 9]),
    Case("eckart", ["compress", 1]),
    Case("eckart", ["compress", 4]),
    Case("eckart", ["compress", 5]),
    Case("eckart", ["write", 0]),
    Case("eckart", ["write", 1]),
    Case("elastic", ["compress", 2]),
    Case("elastic", ["write", 1]),
    *(Case("eckart", kill_in_file=n) for n in (2, 9, 19, 24, 31, 44)),
    Case("svd-llm", ["compress", 1]),
    Case("svd-llm", ["write", 0]),
    Case("svd-llm", kill_in_file=11),
    Case("aa-svd", ["compress", 1]),
    Case("aa-svd", ["compress", 4]),
    Case("aa-svd", ["write", 0]),
    Case("basis-sharing", ["compress", 1]),
    Case("basis-sharing", ["compress", 2]),
    Case("basis-sharing", kill_in_file=8),
    Case("basis-sharing", kill_in_file=10),
    Case("basis-sharing", kill_in_file=13),
    Case("acip", ["train", 7]),
    Case("acip", ["train", 53]),
    Case("acip", ["tune", 57]),
    Case("acip", ["write", 0]),
    Case("acip", kill_in_file=2),
    # truncated weights, their gradients, corrected weights, their statistics; then those of the second correction
    *(Case("zs-svd", kill_in_file=n) for n in (31, 55, 64, 80, 120, 150)),
    Case("fusegpt", ["fuse", 7]),
    Case("fusegpt", ["fuse", 113]),
    Case("fusegpt", ["write", 0]),
    Case("fusegpt", kill_in_file=2),
    Case("neurons", ["compress", 2]),
    Case("neurons", ["write", 0]),
    Case("lora", ["lora", 53]),
    Case("lora", ["lora", 117]),
    Case("lora", ["write", 0]),
    Case("lora", kill_in_file=13),
    Case("coded-units", ["compress", 2]),
    Case("coded-slices", ["compress", 2]),
    Case("coded-slices", ["write", 7]),
    Case("coded-blocks", ["fuse", 113]),
    Case("coded-blocks", ["compress", 1]),
    Case("coded-basis", ["compress", 2]),
    Case("coded-elastic", ["compress", 2]),
]
# bytes: nothing fits; statistics fit, but hidden states do not; blocks fit, but the output does not
FULL = [Case("eckart", largest_file=size) for size in (300, 20_000, 700_000)]


# The other cases take a minute.
USUAL = {
    "eckart-backward-3",
    "eckart-compress-4",
    "eckart-write-0",
    "eckart-file-19",
    "svd-llm-compress-1",
    "aa-svd-compress-4",
    "elastic-compress-2",
    "basis-sharing-compress-1",
    "basis-sharing-file-10",
    "acip-train-53",
    "acip-tune-57",
    "zs-svd-file-120",
    "fusegpt-fuse-113",
    "neurons-compress-2",
    "lora-lora-117",
    "coded-units-compress-2",
    "coded-slices-compress-2",
    "coded-blocks-compress-1",
    "coded-basis-compress-2",
    "coded-elastic-compress-2",
}


def marked(cases: list[Case]) -> list:
    """Return cases as parameters, those that are not usual marked as slow."""
    slow = [[] if case.name in USUAL or case.largest_file else [pytest.mark.slow] for case in cases]
    return [pytest.param(case, id=case.name, marks=marks) for case, marks in zip(cases, slow, strict=True)]


class Runs:
    """What the first and second runs of some cases did."""

    def __init__(self, parent: Path, model: Path, text: Path, cases: list[Case]) -> None:
        self.parent, self.model, self.text = parent, model, text
        runs = [self._run(method, "whole", method) for method in dict.fromkeys(case.method for case in cases)]
        for case in cases:
            limits = {"kill": case.kill, "kill_in_file": case.kill_in_file, "largest_file": case.largest_file}
            runs += [self._run(case.name, "first", case.method, **limits), self._run(case.name, "second", case.method)]
        (parent / "runs.json").write_text(json.dumps(runs))
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", FORKS, parent / "runs.json"], check=True, timeout=500, env=environment)

    def _run(self, name: str, which: str, method: str, **limits) -> dict:
        folder = self.parent / name
        (folder / "work").mkdir(parents=True, exist_ok=True)
        arguments = {"method": method, "keep": 0.7, "calibration": str(self.text), "samples": 4, "length": 32}
        arguments["check"] = False  # a process of its own for every run takes minutes in all
        return {
            "model": str(self.model),
            "out": str(folder / "work" / "out"),
            "cache": str(folder / "cache"),
            "answer": str(folder / which),
            "arguments": arguments | {"settings": SETTINGS.get(method, {})} | OTHERS.get(method, {}),
            **limits,
        }

    def answer(self, name: str, which: str) -> dict:
        path = self.parent / name / which
        return json.loads(path.read_text()) if path.exists() else {}

    def status(self, name: str, which: str) -> dict:
        return json.loads((self.parent / name / f"{which}.status").read_text())

    def files(self, name: str) -> dict[str, bytes]:
        out = self.parent / name / "work" / "out"
        return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, demo, text) -> Runs:
    items = [item for item in request.session.items if item.module is request.module]
    cases = {item.callspec.params["case"].name: item.callspec.params["case"] for item in items}  # those selected
    return Runs(tmp_path_factory.mktemp("runs"), demo, text, list(cases.values()))


@pytest.mark.parametrize("case", marked(KILLED))
def test_a_killed_run_goes_on_to_the_same_bytes(case, runs):
    killed, again = runs.status(case.name, "first"), runs.answer(case.name, "second")
    assert killed["status"] == -9, "it ended before it was killed"
    assert "out" not in killed["left"]  # the output appears whole or not at all
    assert not {"error", "crash"} & again.keys(), again
    assert runs.status(case.name, "second") == {"status": 0, "left": ["out"]}
    whole, files = runs.files(case.method), runs.files(case.name)
    assert whole.keys() == files.keys()
    assert [name for name in whole if whole[name] != files[name]] == []


@pytest.mark.parametrize("case", marked([case for case in KILLED if case.kill and case.kill[0] != "plan"]))
def test_what_was_finished_is_not_done_again(case, runs):
    stage, done = case.kill
    steps = [step for step in runs.answer(case.name, "second")["stages"] if step[0] != "check"]
    first = {name: n for name, n, _ in reversed(steps)}  # the first step of every stage
    if stage == "forward":
        assert first["forward"] == done
        return
    if case.method in ("fusegpt", "lora"):
        at = done if stage in ("fuse", "lora") else 120
        start = at // 60 * 60 + at % 60 // 50 * 50  # two runs of 60 steps, a state every 50
        again = {n for name, n, _ in steps if name in ("fuse", "lora")} - {0, 60, 120}
        assert all(n >= start for n in again)
        return
    if case.method in ("coded-slices", "coded-blocks"):  # the smaller model is made anew, its blocks of codes are not
        assert first["compress"] == (done if stage == "compress" else 0)
        return
    assert "forward" not in first or first["forward"] == 5
    if case.method == "acip":
        assert first["train"] == (done // 50 * 50 if stage == "train" else 60)  # a state every 50 steps
        assert first.get("tune") == {"train": 0, "tune": 50, "write": 60}[stage]
    elif stage in ("compress", "write"):
        assert not {"objective", "backward"} & first.keys()
        assert first["compress"] == (done if stage == "compress" else 5)


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_a_full_disk_ends_in_a_sentence(case, runs):
    first, left = runs.answer(case.name, "first"), runs.status(case.name, "first")["left"]
    assert "crash" not in first, first["crash"]
    assert first["error"].startswith("cannot write ")
    assert first["error"].endswith("; free some space or choose another place")
    assert "\n" not in first["error"]
    assert "out" not in left
    if case.largest_file < 700_000:  # before the first block is done, nothing stays behind
        assert left == []
    else:
        assert len(left) == 1  # finished blocks wait for the next run


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_with_space_again_the_run_goes_on_to_the_same_bytes(case, runs):
    assert runs.status(case.name, "second") == {"status": 0, "left": ["out"]}
    assert runs.files(case.name) == runs.files(case.method)
    if case.largest_file == 700_000:
        steps = runs.answer(case.name, "second")["stages"]
        assert [n for stage, n, _ in steps if stage == "compress"] == [5]
