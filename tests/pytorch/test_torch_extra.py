"""The parts of `partita.torch` that need no PyTorch: these tests run everywhere."""

from pathlib import Path

import pytest

import partita
from partita.capture.names import MODULE_SCOPE, layer_path
from partita.torch.extra import Package


def test_a_missing_package_is_named_in_a_sentence_when_it_is_used() -> None:
    package = Package("surely_not_installed")
    with pytest.raises(partita.PartitaError) as error:
        package.Tensor  # noqa: B018
    assert str(error.value) == (
        "PyTorch modules need surely_not_installed, which is not installed. Install the extra: "
        "pip install 'partita[torch]'."
    )


def test_a_package_of_an_unfit_version_is_named_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_an_older_torch.py").write_text("import json\n\njson.dim_Dimname\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(partita.PartitaError) as error:
        Package("of_an_older_torch").tensor  # noqa: B018
    assert str(error.value) == (
        "of_an_older_torch does not work with the installed packages (module 'json' has no "
        "attribute 'dim_Dimname'). Install the versions of the extra: pip install 'partita[torch]'."
    )


def test_an_installed_package_is_used_as_itself() -> None:
    assert Package("json").loads("[1]") == [1]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("jit(GPT)/jvp(torch:blocks.0.up/linear)/dot_general", "blocks.0.up"),
        ("jit(GPT)/transpose(jvp(torch:blocks.0.up))/linear/aten::mm/dot_general", "blocks.0.up"),
        ("jit(GPT)/jvp(torch:)/add/add", ""),
        ("jit(GPT)/jvp(block/dense)/dot_general", "block/dense"),
    ],
)
def test_a_scope_of_a_module_names_its_operators_without_functions(name: str, path: str) -> None:
    assert MODULE_SCOPE == "torch:"
    assert layer_path(name) == path
