"""Exports in vLLM as anyone has it: our plug-in is not even registered (VLLM_PLUGINS is empty).

vLLM's kernel for 4 bits on the CPU computes in float16 or bf16, so these bounds are wider than those of our own layers.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qe_dist.checkpoint.export import ADAPTER, Exported, export
from qe_dist.core.scheme import Scheme
from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.io.checkpoint import MANIFEST
from qe_dist.methods.recipes import load_recipe
from tests.vllm.generate import Answers, Job, generate
from tests.vllm.questions import DATA, EQUAL, MODEL, QUESTIONS, ROOT, prompts
from tests.vllm.twin import Twin

pytestmark = [pytest.mark.vllm, pytest.mark.nightly]

BASES = ("rtn-w4a8", "gptq+qera-w4a6k64@0.25f4")
ADAPTED = "aser-w4a16g64"
"""Its LoRA holds the most important channels alone, so that nothing goes without it."""
FEW = 50
"""Questions that tell that a repair is missing."""
MEAN_LOGPROB = 0.005
"""How far the log-probability of a token may be off on average, stories included; float16 was seen to need 0.0008."""


@pytest.fixture(scope="module")
def adapted(folder: Path) -> Path:
    """Our checkpoint of the recipe that becomes a base and a LoRA."""
    run = RunConfig(MODEL, load_recipe(ADAPTED), DATA / "calibration.jsonl", folder / ADAPTED)
    local.quantize(run)
    return run.output


@pytest.fixture(scope="module")
def stock(checkpoints: dict[str, Path], adapted: Path, folder: Path) -> Answers:
    """What vLLM alone answers from exports."""
    places = {name: folder / f"stock-{name}" for name in (*BASES, ADAPTED)}
    jobs = [Job(places[name].name, str(places[name]), {"dtype": "float16"}) for name in BASES]
    for name in BASES:
        export(checkpoints[name], places[name], peft=False)
    exported: Exported = export(adapted, places[ADAPTED], peft=True)
    lora = {"enable_lora": True, "max_lora_rank": exported.max_lora_rank, "dtype": "float16"}
    jobs.append(Job(places[ADAPTED].name, str(places[ADAPTED]), lora, str(places[ADAPTED] / ADAPTER)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "")
        return generate(jobs, prompts(), 1, folder)


def stripped(checkpoint: Path, folder: Path) -> Path:
    """Our checkpoint without repairs, its activations in 16 bits: what a base-only export should be."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(".run", MANIFEST))
    config = json.loads((folder / "config.json").read_text())
    for layout in config["quantization_config"]["layouts"]:
        for group in layout.values():
            scheme = Scheme.parse(group["scheme"])
            group["scheme"] = str(Scheme(scheme.weight_bits, group_size=scheme.group_size))
            for shapes in (group["input"], *group["linears"].values()):
                for name in [name for name in shapes if name.startswith("lr_")]:
                    del shapes[name]
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("block-*.safetensors"):
        save_file({n: t for n, t in load_file(path).items() if ".lr_" not in n}, path)
    return folder


@pytest.mark.parametrize("recipe", BASES)
def test_vllm_answers_from_the_base_alone(
    recipe: str, checkpoints: dict[str, Path], stock: Answers, tmp_path: Path
) -> None:
    given = stock[f"stock-{recipe}"]
    assert "error" not in given, given
    same, off = Twin(stripped(checkpoints[recipe], tmp_path / "bare")).compare(prompts(), given)
    assert sum(same[:QUESTIONS]) >= EQUAL * QUESTIONS
    assert off.mean() <= MEAN_LOGPROB


def test_vllm_repairs_the_base_by_the_lora(adapted: Path, stock: Answers, tmp_path: Path) -> None:
    """As our whole checkpoint in transformers; without its repair it would answer otherwise."""
    given = stock[f"stock-{ADAPTED}"]
    assert "error" not in given, given
    same, off = Twin(adapted).compare(prompts(), given)
    assert sum(same[:QUESTIONS]) >= EQUAL * QUESTIONS
    assert off.mean() <= MEAN_LOGPROB
    alone, off = Twin(stripped(adapted, tmp_path / "bare")).compare(prompts()[:FEW], given[:FEW])
    assert sum(alone) < 0.2 * FEW
    assert off.mean() > 100 * MEAN_LOGPROB


def test_the_commands_of_the_page_have_options_that_vllm_takes() -> None:
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "for command in sys.argv[1:]:\n"
        "    told = make_arg_parser(FlexibleArgumentParser()).parse_args(command.split())\n"
        "    modules = [[m.name, m.path] for m in told.lora_modules or []]\n"
        "    print(json.dumps([told.model_tag, told.enable_lora, told.max_lora_rank, modules]))"
    )
    page = (ROOT / "docs" / "guides" / "serving.md").read_text()
    commands = re.findall(r"^    vllm serve (STOCK.*)$", page, re.MULTILINE)
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    plain, repaired = map(json.loads, done.stdout.splitlines()[-2:])
    assert plain[0] == repaired[0] == "STOCK"
    assert repaired[1:] == [True, 32, [["repaired", f"STOCK/{ADAPTER}"]]]
