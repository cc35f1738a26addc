"""Whatever is asked for is made whole or not at all, and never over something else."""

import pytest
from interchange import make_experiment

from tale_jax.convert import formats


@pytest.fixture
def exports(monkeypatch):
    """A format that writes two files, and fails between them when it is asked for float16."""

    def write(experiment, out, dtype):
        out.mkdir()
        (out / "first").write_text(dtype)
        if dtype == "float16":
            raise ValueError("no")
        (out / "second").write_text(dtype)

    monkeypatch.setitem(formats.EXPORTS, "two", write)


def test_an_export_is_whole_or_not_there(tmp_path, exports):
    experiment = make_experiment(tmp_path)
    with pytest.raises(ValueError, match="no"):
        formats.export_model(experiment, "two", tmp_path / "deep" / "out", "float16")
    assert not list((tmp_path / "deep").iterdir())
    formats.export_model(experiment, "two", tmp_path / "deep" / "out")
    assert {path.name for path in (tmp_path / "deep" / "out").iterdir()} == {"first", "second"}


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_there_stays(tmp_path, exports, kind):
    out = tmp_path / "out"
    {"file": out.touch, "folder": out.mkdir, "link": lambda: out.symlink_to(tmp_path / "nowhere")}[kind]()
    with pytest.raises(ValueError, match=r"--out=.*out must not exist yet"):
        formats.export_model(make_experiment(tmp_path), "two", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (
        out.is_symlink() or not out.is_dir() or not [*out.iterdir()]
    )


def test_a_mistake_is_corrected_as_told(trained, tmp_path):
    """What launch/convert.py is told, and what its answer says to tell it."""
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"give one of --to=FORMAT .* and --from=FORMAT"):
        formats.convert(trained, out=out)
    with pytest.raises(ValueError, match="--out is missing; give --out=PATH"):
        formats.convert(trained, to="gguf")
    with pytest.raises(ValueError, match="--path has no use with --to; leave it out"):
        formats.convert(trained, to="gguf", out=out, path=tmp_path)
    out.touch()
    with pytest.raises(ValueError, match=r"--out=.* must not exist yet, so that nothing is lost; remove it, or give"):
        formats.convert(trained, to="gguf", out=out)
    out.unlink()
    assert formats.convert(trained, to="huggingface", out=out) == out
    with pytest.raises(ValueError, match="--path is missing; give --path=PATH"):
        formats.convert(tmp_path / "back", source="huggingface")
    assert formats.convert(tmp_path / "back", source="huggingface", path=out) == tmp_path / "back"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out"]
