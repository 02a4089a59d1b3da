"""Files that are read are checked by one mechanism; files that are written replace the old one as a
whole."""

import os
import resource
from pathlib import Path

import pytest

from partita.errors import PartitaError
from partita.files import writing
from partita.files.reading import FileKind, read_json
from partita.files.schema import items, mapping, number, plain, table, text, whole_number

KIND = FileKind("a note", "write it again", most_bytes=10**6)
SCHEMA = table(
    {"size": whole_number(1, 8)},
    {"names": items(text(5)), "times": mapping(number(0)), "rest": plain},
)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{}", ": size is missing: give an object with size."),
        (b'{"size": 9}', ": size is 9: give a whole number from 1 to 8."),
        (b'{"size": true}', ": size is true: give a whole number from 1 to 8."),
        (b'{"size": 1, "names": ["a", 2]}', ": names[1] is 2: give a text of at most 5 characters"),
        (b'{"size": 1, "times": {"a": -1}}', ": times.a is -1: give a finite number of at least 0"),
        (b'{"size": 1, "times": {"a": 1e999}}', ": times.a is inf: give a finite number"),
        (b'{"size": 1, "size": 2}', ": size is given twice: give it once."),
        (b'{"size": NaN}', ": the content is not finite (NaN): give finite numbers."),
        (b'{"size": 1, "colour": 2}', ": colour is an unknown key: use only size, names, times"),
        (b'{"size": 1, "names": ["\\ud800"]}', ": names[0] is '\\ud800': give a text of at most"),
        (b'{"size": 1, "rest": ' + b"[" * 50 + b"]" * 50 + b"}", "is nested too deeply: nest at"),
        (b"[" * 200_000, " is not a note (it is nested too deeply): write it again."),
        (b'{"size": ' + b"9" * 5000 + b"}", " is not a note (it has a number of more than 4,300"),
        (b"\xff\xfe{", " is no text in UTF-8 (byte 0 is 0xff): write it again."),
        (b"{", " is not a note (Expecting property name enclosed in double quotes in line 1"),
        (b" " * 10**6 + b"{", " is too large (1,000,001 bytes, and a note has at most 1,000,000)"),
    ],
)
def test_a_wrong_file_is_one_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with pytest.raises(PartitaError) as error:
        read_json(path, KIND, SCHEMA)
    assert str(error.value).startswith(str(path)) and sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_bytes(b'\xef\xbb\xbf{"size": 3}')
    assert read_json(tmp_path / "note.json", KIND, SCHEMA) == {"size": 3}


def test_a_pipe_or_a_folder_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, problem in ((tmp_path, "a folder"), (tmp_path / "pipe", "a device or a pipe")):
        with pytest.raises(PartitaError, match=f"{path} is {problem}: name a file."):
            read_json(path, KIND, SCHEMA)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), writing.open_drafts(path) as drafts:
        with drafts.open(path) as file:
            file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["note"]


def test_a_text_on_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            writing.write_text(path, "new" * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["note"]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("target")
    writing.check_writable(link)
    assert link.is_symlink() and not link.exists()
    writing.write_text(link, "new")
    assert link.is_symlink() and (tmp_path / "target").read_text() == "new"


def test_permissions_stay(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_text("old")
    path.chmod(0o640)
    writing.write_text(path, "new")
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device /dev/full")
def test_a_device_is_written_directly() -> None:
    writing.check_writable("/dev/null")
    writing.write_text("/dev/null", "x")
    with pytest.raises(OSError, match="No space left"):
        writing.write_text("/dev/full", "x")
