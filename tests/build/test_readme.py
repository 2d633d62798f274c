"""What README and the user guide say is what happens: code runs, commands and links exist."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import torch
from torch import fx
from torch.ao.quantization import quantize_dynamic
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import throughtime
from checkout import ROOT
from throughtime import env
from throughtime.__main__ import make_parser

README, GUIDE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "python/README.md"))
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pages in ("*.md", "bench/**/*.md", "csrc/**/*.md", "python/**/*.md")
    for page in ROOT.glob(pages)
)


def blocks(language: str) -> list[str]:
    fence = rf"^```{language}\n(.*?)^```$"
    return re.findall(fence, README + GUIDE, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.split("\n")]
    return [line for line in lines if line]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0][:40])
def test_python_block_runs(code: str) -> None:
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_two_definitions_of_h_detach_agree(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (code for code in blocks("python") if "def h_detach_lstm" in code)
    torch.manual_seed(1)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    first, second = (float(number) for number in re.findall(r"\d+\.\d+", capsys.readouterr().out))
    assert first == pytest.approx(second, rel=1e-4) and first > 0


@pytest.mark.parametrize("line", commands())
def test_command_exists(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE)
    elif words[0] == "pytest":
        assert list((ROOT / words[1]).glob("test_*.py"))
    else:
        assert words[:3] == ["python", "-m", "throughtime"], line
        assert callable(make_parser().parse_args(words[3:]).run)


def test_report_and_guide_name_the_same_environment_variables() -> None:
    ours = {name for name in env.VARIABLES if name.startswith("THROUGHTIME_")}
    assert ours == set(re.findall(r"^\| `(THROUGHTIME_\w+)` \|", GUIDE, flags=re.MULTILINE))


def test_readme_is_short() -> None:
    assert README.count("\n") <= 200


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text("utf-8")):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert "://" in link or target.exists(), link
        if heading and "://" not in link:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), flags=re.MULTILINE)
            assert heading in [re.sub(r"\W+", "-", title.lower()) for title in titles], link


def test_the_tables_of_the_compatibility_page_can_be_reached_from_the_file() -> None:
    page = (ROOT / "python/docs/compatibility.rst").read_text("utf-8")
    tables = re.findall(r":file: (\S+)", page)
    assert tables and tables == re.findall(r"`\S+ <(\S+\.csv)>`_", page)
    assert all((ROOT / "python/docs" / table).is_file() for table in tables)


class Model(torch.nn.Module):
    """A layer and a head, for the limits in README's table."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn: torch.nn.Module = throughtime.LSTM(3, 4, **options)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.rnn(input)[0])
        return output


class LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, throughtime.LSTM) or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_limit_torchscript() -> None:
    with pytest.raises(ValueError, match="Unknown type annotation"):
        torch.jit.script(Model())
    traced = torch.jit.script(torch.jit.trace(Model().eval(), torch.randn(5, 2, 3)))
    assert traced(torch.randn(9, 2, 3)).shape == (9, 2, 2)


def test_limit_fx() -> None:
    with pytest.raises(TypeError, match="got Proxy"):
        fx.symbolic_trace(Model())
    assert "call_module" in {node.op for node in LeafTracer().trace(Model()).nodes}


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_limit_quantisation() -> None:
    model, kinds = Model(), {torch.nn.LSTM, torch.nn.Linear}
    assert type(quantize_dynamic(model, kinds).rnn) is throughtime.LSTM
    assert isinstance(model.rnn, throughtime.LSTM)
    model.rnn = model.rnn.to_torch()
    assert "quantized" in type(quantize_dynamic(model, kinds).rnn).__module__


@pytest.mark.parametrize("reentrant", [False, True])
def test_limit_checkpoint(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = Model(detach_prob=0.5), torch.randn(30, 2, 3, requires_grad=True)
    gradients = []
    for _ in range(2):
        x.grad = None
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) == reentrant  # the same mask twice


def test_limit_packed_export() -> None:
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    with pytest.raises(GuardOnDataDependentSymNode):
        torch.export.export(torch.nn.Sequential(throughtime.LSTM(3, 4)), (packed,))
