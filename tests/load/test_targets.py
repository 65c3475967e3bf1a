"""What may be named as a target, and what is answered where it cannot be."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fxroof.analyzer.errors import TargetError
from fxroof.analyzer.load import load
from support import CONFIGS, MODELS, cut
from torch import nn

HEAD = "import torch\nfrom torch import nn\n"
LINEAR = (
    "class {0}(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.l = nn.Linear(4, 4)\n"
)

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEAD + text)
        return name

    return file


def refused(target: str, init: str = "") -> str:
    with pytest.raises(TargetError) as caught:
        load(target, init=init)
    return f"{caught.value.message}\n{caught.value.hint}"


def kind(target: str, init: str = "") -> str:
    return type(load(target, init=init).module).__name__


@pytest.mark.parametrize(
    ("file", "name", "parameters"),
    [
        ("nanogpt_like.py", "GPT", 124_475_904),
        ("gptfast_like.py", "Transformer", 1_923_125_248),
        ("llama_reference_like.py", "Transformer", 1_923_125_248),
        ("mamba_minimal_like.py", "Mamba", 13_747_968),
        ("mingpt_like.py", "GPT", 163_037_184),
        ("dit_like.py", "DiT", 675_129_632),  # DiT-XL/2
    ],
)
def test_the_whole_model_is_found_among_its_parts(file: str, name: str, parameters: int) -> None:
    model = load(str(MODELS / file))
    assert model.name == name
    assert model.parameters == parameters
    assert all(p.is_meta for p in model.module.parameters())


def test_config_without_annotation_is_the_dataclass_of_the_file(write: Write) -> None:
    file = write(
        "gpt.py",
        "from dataclasses import dataclass\n"
        "class GPT(nn.Module):\n"
        "    def __init__(self, config):\n"
        "        super().__init__()\n"
        "        self.l = nn.Linear(config.n, config.n)\n"
        "@dataclass\nclass GPTConfig:\n    n: int = 8\n"
        "@dataclass\nclass TrainConfig:\n    steps: int = 8\n",
    )
    assert load(file).parameters == 8 * 8 + 8


def test_annotations_that_are_strings_are_resolved(tmp_path: Path) -> None:
    file = tmp_path / "future.py"
    file.write_text(
        "from __future__ import annotations\n" + HEAD + "from dataclasses import dataclass\n"
        "class GPT(nn.Module):\n    def __init__(self, config: Config):\n        super().__init__()\n"
        "        self.l = nn.Linear(config.n, config.n)\n"
        "@dataclass\nclass Config:\n    n: int = 8\n"
    )
    assert load(str(file)).name == "GPT"


def test_several_models_are_listed_with_a_command_for_each(write: Write) -> None:
    file = write("it's two.py", LINEAR.format("A") + LINEAR.format("B"))
    text = refused(file)
    assert "2 models" in text
    for name in "AB":
        assert f"fxroof analyze 'it'\"'\"'s two.py:{name}'" in text
        assert kind(f"{file}:{name}") == name


def test_losses_and_unused_layers_are_no_candidates(write: Write) -> None:
    file = write(
        "net.py",
        "class Loss(nn.Module):\n    def forward(self, a, b):\n        return (a - b).abs().sum()\n"
        "class Unused(nn.Module):\n    def __init__(self, dim):\n        super().__init__()\n" + LINEAR.format("Net"),
    )
    assert kind(file) == "Net"
    assert any("Unused" in note for note in load(file).notes)


def test_a_model_that_needs_arguments_is_not_passed_over_for_a_smaller_one(write: Write) -> None:
    file = write(
        "net.py",
        LINEAR.format("Head") + LINEAR.format("Layer") + "class Model(nn.Module):\n    def __init__(self, depth):\n"
        "        super().__init__()\n        self.l = nn.ModuleList([Layer() for _ in range(depth)])\n",
    )
    text = refused(file)
    assert f"fxroof analyze {file}:Head" in text
    assert f"fxroof analyze {file} --init 'Model(depth=...)'" in text
    assert load(file, init="Model(depth=3)").parameters == 3 * 20


def test_what_a_candidate_needs_is_said(write: Write) -> None:
    file = write(
        "args.py",
        "from dataclasses import dataclass\n@dataclass\nclass ModelArgs:\n    dim: int\n    depth: int = 2\n"
        "class Transformer(nn.Module):\n    def __init__(self, args: ModelArgs):\n        super().__init__()\n"
        "        self.l = nn.Linear(args.dim, args.dim)\n",
    )
    text = refused(file)
    assert "it needs args (a ModelArgs, which needs dim)" in text
    assert "--init 'Transformer(ModelArgs(dim=...))'" in text
    assert load(file, init="Transformer(ModelArgs(dim=16))").parameters == 16 * 16 + 16


def test_partials_and_compiled_objects_are_models(write: Write) -> None:
    net = LINEAR.format("Net").replace("__init__(self)", "__init__(self, a, b)").replace("(4, 4)", "(a, b)")
    assert (
        load(write("partial.py", "from functools import partial\n" + net + "Small = partial(Net, 3, b=5)\n")).parameters
        == 20
    )
    assert kind(write("compiled.py", "model = torch.compile(nn.Linear(3, 4))\nalias = model\n")) == "Linear"
    assert kind(write("wrapped.py", "model = nn.DataParallel(nn.Linear(3, 4))\n")) == "Linear"


def test_code_under_main_is_not_run_and_that_is_said(write: Write) -> None:
    file = write("script.py", "if __name__ == '__main__':\n    raise SystemExit('ran')\n")
    assert "is not run" in refused(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise SystemExit(0)", "ends the program"),
        ("def f(:", "SyntaxError"),
        ("import nosuchpackage_x", "No module named 'nosuchpackage_x'"),
        ("def build():\n    return 1 / 0", "broken.py:4: ZeroDivisionError"),
        ("def build():\n    raise SystemExit(0)", "ends the program"),
        ("def build():\n    return 3", "returned a int"),
        ("", "no model found"),
    ],
)
def test_code_that_fails_is_refused_with_its_line(write: Write, text: str, expected: str) -> None:
    assert expected in refused(write("broken.py", text))


def test_modules_of_packages_by_dotted_name_and_by_path(write: Write) -> None:
    write("pkg_of_test/__init__.py", "")
    write("pkg_of_test/layers.py", LINEAR.format("L"))
    write("pkg_of_test/model.py", "from .layers import L\n" + LINEAR.format("Net").replace("nn.Linear(4, 4)", "L()"))
    for target in ("pkg_of_test.model:Net", "pkg_of_test.model", "pkg_of_test/model.py", "pkg_of_test:model.Net"):
        assert kind(target) == "Net"
    assert "Models in this file: Net" in refused("pkg_of_test.model:Nothing")
    assert "no module that Python can import" in refused("pkg_of_test.nothing:Net")
    assert kind("torch.nn:Identity") == "Identity"


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("GPT(", "not a Python expression"),
        ("GPT(Conf())", "Names in"),
        ("GPT(3)", "nanogpt_like.py:"),
        ("GPTConfig()", "is a GPTConfig, not a model"),
    ],
)
def test_init_that_fails_says_why(init: str, expected: str) -> None:
    assert expected in refused(str(MODELS / "nanogpt_like.py"), init)


def test_init_builds_in_the_namespace_of_the_file() -> None:
    whole, half = (load(str(MODELS / "nanogpt_like.py"), init=f"GPT(GPTConfig(n_layer={n}))") for n in (12, 6))
    block = 12 * 768 * 768 + 13 * 768
    assert whole.parameters - half.parameters == 6 * block
    assert "not Python code" in refused(str(CONFIGS / "gpt2"), "GPT()")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".ckpt"])
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    file = tmp_path / f"model{suffix}"
    torch.save(Bomb(), file)
    assert "pickle" in refused(str(file))
    assert not (tmp_path / "exploded").exists()


def test_weights_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "weights only" in refused(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "target", ["", ":Model", "nosuch.py", "nosuch.pt2", "nosuch", "a:b:c", "no/such/folder", "hf:", "hf:a/b/c"]
)
def test_nothing_there_is_one_message(target: str) -> None:
    assert refused(target)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "no model_type"),
        ("{}", "no model_type"),
        ('{"model_type": "nosuchtype"}', "cannot read this config"),
        ('{"model_type": "nosuchtype", "auto_map": {"AutoConfig": "c.C"}}', "--trust-remote-code"),
    ],
)
def test_configs_that_are_none(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert expected in refused(str(tmp_path))


CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class C(PreTrainedConfig):
    model_type = "acme"

class M(PreTrainedModel):
    config_class = C
    def __init__(self, config):
        super().__init__(config)
        self.l = torch.nn.Linear(7, 7)
        self.post_init()
"""


def test_code_of_a_repository_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "acme"
    folder.mkdir()
    (folder / "code_of_acme.py").write_text(CODE)
    content = {
        "model_type": "acme",
        "auto_map": {"AutoConfig": "code_of_acme.C", "AutoModelForCausalLM": "code_of_acme.M"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    assert "--trust-remote-code" in refused(str(folder))
    assert load(str(folder), trust_remote_code=True).parameters == 56


def test_hub_names_come_from_the_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = tmp_path / "models--acme--gpt" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--acme--gpt" / "refs").mkdir()
    (tmp_path / "models--acme--gpt" / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text((CONFIGS / "gpt2" / "config.json").read_text())
    model = load("hf:acme/gpt")
    assert (model.name, model.source, model.parameters) == ("gpt", "hf:acme/gpt", 124_439_808)
    assert "hub cannot be reached" in refused("hf:acme/absent")


@pytest.mark.parametrize(
    ("folder", "architectures", "expected"),
    [
        ("bert-base", None, "BertForMaskedLM"),
        ("bert-base", ["BertModel"], "BertModel"),
        ("bert-base", ["NoSuchModel"], "BertForMaskedLM"),
        ("flan-t5-xl", None, "T5ForConditionalGeneration"),
        ("whisper-large-v3", None, "WhisperForConditionalGeneration"),
        ("vit-base-patch16-224", None, "ViTForImageClassification"),
        ("clip-vit-l14", None, "CLIPModel"),
        ("llava-1.5-7b", None, "LlavaForConditionalGeneration"),
        ("llama-3-8b", None, "LlamaForCausalLM"),
        ("llama-3-8b", ["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
    ],
)
def test_the_class_of_a_config_is_the_one_it_names_or_its_types(
    folder: str, architectures: list[str] | None, expected: str
) -> None:
    copy = Path(cut(str(CONFIGS / folder), 1))
    content = json.loads((copy / "config.json").read_text())
    content["architectures"] = architectures
    (copy / "config.json").write_text(json.dumps(content))
    assert kind(str(copy)) == expected


PUBLISHED = {
    "gemma-3-27b": 27_432_406_640,
    "mixtral-8x22b": 140_620_634_112,
    "llama-4-scout": 108_641_793_536,
    "olmoe-1b-7b": 6_919_161_856,
    "mamba2-2.7b": 2_702_599_680,
    "jamba-1.5-mini": 51_570_323_328,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "bert-base": 109_514_298,
    "flan-t5-xl": 2_849_757_184 - 32_128 * 2048,  # transformers 5 ties the head, which the checkpoint holds apart
    "whisper-large-v3": 1_543_490_560,
    "vit-base-patch16-224": 86_567_656,
    "clip-vit-l14": 427_616_513,
    "llava-1.5-7b": 7_063_427_072,
    "qwen2-vl-7b": 8_291_375_616,
}


@pytest.mark.parametrize(("folder", "parameters"), PUBLISHED.items())
def test_parameters_are_those_published(folder: str, parameters: int) -> None:
    assert load(str(CONFIGS / folder)).parameters == parameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(x).relu()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Net(), (torch.randn(4, 16),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def altered(archive: Path, change: Callable[[str, bytes], bytes], extra: str = "") -> Path:
    path = archive.with_name("altered.pt2")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        if extra:
            new.writestr(extra, b"x")
    return path


def test_exported_programs_are_targets(archive: Path) -> None:
    model = load(str(archive))
    assert model.parameters == 16 * 32 + 32
    assert model.program is not None
    assert model.dtypes == {"float32": 544}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b'"use_pickle": false', b'"use_pickle": true', "stored as a pickle"),
        (b"torch.ops.aten.relu.default", b"torch.os.system", "no tensor operator"),
        (b"torch.ops.aten.relu.default", b"torch.ops.aten.from_file.default", "no tensor operator"),
        (b"Symbol(", b"exec(", "more than arithmetic"),
        (b"Symbol('s", b"Symbol('a.b c", "more than arithmetic"),
    ],
)
def test_programs_that_could_run_code_while_read_are_refused(
    archive: Path, old: bytes, new: bytes, expected: str
) -> None:
    changed = []

    def change(_: str, content: bytes) -> bytes:
        changed.append(old in content)
        return content.replace(old, new)

    assert expected in refused(str(altered(archive, change)))
    assert any(changed)


@pytest.mark.parametrize(
    "extra", ["net/data/constants/custom_obj_0", "net/data/constants/opaque_obj_0", "net/data/weights/net.pt"]
)
def test_programs_with_objects_beside_tensors_are_refused(archive: Path, extra: str) -> None:
    assert "could run code" in refused(str(altered(archive, lambda _, content: content, extra)))


def test_files_that_are_no_program(tmp_path: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(b"no zip")
    assert "not a program" in refused(str(tmp_path / "a.pt2"))
    with zipfile.ZipFile(tmp_path / "b.pt2", "w") as archive:
        archive.writestr("net/data/aotinductor/net/net.so", b"x")
    assert "machine code" in refused(str(tmp_path / "b.pt2"))
