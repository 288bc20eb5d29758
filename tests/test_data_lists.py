"""pytest tests/test_data_lists.py -- list files of every format, and files that appear whole or not."""

import pytest
from PIL import Image

from data import Sample, atomic_write, read_list


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.jpg", "b c.jpg", "d.JPG", "e,f.jpg"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, "JPEG")
    return tmp_path


@pytest.mark.parametrize(
    "name, text",
    [
        ("l.txt", "a.jpg 0\nb c.jpg 1\nd.JPG 2\n"),
        ("l.txt", "\ufeffa.jpg 0\r\n\r\n# a comment\r\n  b c.jpg   1  \r\nd.jpg\t2"),
        ("l.txt", "./a.jpg 0.0\nb c.jpg 1.0\nd.JPG 2.\n"),
        ("l.txt", "path\tlabel\na.jpg\t0\nb c.jpg\t1\nd.JPG\t2\n"),
        ("l.txt", "label,x,file\n0,,a.jpg\n1,,b c.jpg\n2,,d.JPG\n"),
        ("l.csv", "a.jpg,0\nb c.jpg,1\n# a comment\nd.jpg, 2\n"),
        ("l.csv", "\ufeffscore,Image,Label\r\n.5,a.jpg,0\r\n.1,b c.jpg,1\r\n.2,d.JPG,2\r\n"),
        ("l.csv", "picture,score\na.jpg,0\nb c.jpg,1\nd.JPG,2\n"),
        ("l.TSV", "age\tfilename\n0\ta.jpg\n1\tb c.jpg\n2\td.JPG\n"),
    ],
)
def test_list_formats(pictures, name, text):
    (pictures / name).write_bytes(text.encode())
    expected = [Sample("a.jpg", 0), Sample("b c.jpg", 1), Sample("d.JPG", 2)]
    assert read_list(pictures / name, pictures, 3) == expected


def test_csv_quotes(pictures):
    (pictures / "l.csv").write_text('"e,f.jpg",1\n')
    assert read_list(pictures / "l.csv", pictures) == [Sample("e,f.jpg", 1)]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("l.txt", "a.jpg 0\na.jpg\n", "l.txt:2: expected an image path and a label, got 'a.jpg'"),
        ("l.txt", "# x\n\na.jpg,1\n", "l.txt:3: expected an image path and a label"),
        ("l.txt", "a.jpg one\n", "l.txt:1: label 'one' is no whole number"),
        ("l.txt", "a.jpg 1.5\n", "l.txt:1: label '1.5' is no whole number"),
        ("l.txt", "a.jpg inf\n", "l.txt:1: label 'inf' is no whole number"),
        (
            "l.txt",
            "a.jpg 0\nb c.jpg 3\n",
            r"l.txt:2: label 3, but ranks are counted 0 .. 2 \(3 ranks\)",
        ),
        ("l.txt", "a.jpg -1\n", r"l.txt:1: label -1, but ranks are counted 0 .. 2"),
        ("l.csv", "path,label\na.jpg\n", "l.csv:2: expected an image path and a label"),
        ("l.csv", "path,label\n,1\n", "l.csv:2: expected an image path and a label"),
        ("l.csv", "a.jpg,x\n", "l.csv:1: label 'x' is no whole number"),
        (
            "l.csv",
            "name,x,y\na.jpg,1,2\n",
            "l.csv:1: 3 columns, and no header that names one `path`",
        ),
        ("l.txt", "\n# only words\n", "l.txt lists no image; expected lines `path label`"),
        ("l.csv", "path,label\n", "l.csv lists no image; expected lines `path label`"),
        (
            "l.txt",
            "x.jpg 0\na.jpg 1\nsub/y.jpg 2\n",
            r"l.txt: 2 of 3 images are not under .*, the first: 'x.jpg', 'sub/y.jpg'",
        ),
    ],
)
def test_bad_lists(pictures, name, text, words):
    (pictures / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_list(pictures / name, pictures, 3)


def test_negative_label_without_a_number_of_ranks(pictures):
    (pictures / "l.txt").write_text("a.jpg -2\n")
    with pytest.raises(ValueError, match="l.txt:1: label -2, but ranks are counted 0$"):
        read_list(pictures / "l.txt", pictures)


def test_list_in_another_encoding(pictures):
    (pictures / "l.txt").write_bytes("a.jpg 0\né.jpg 0\n".encode("latin-1"))
    with pytest.raises(ValueError, match="l.txt:2: this is not UTF-8 text; save the file as UTF-8"):
        read_list(pictures / "l.txt", pictures)


def test_a_half_written_file_never_gets_the_name(tmp_path):
    path = tmp_path / "last.pt"

    def fail(tmp_path):
        tmp_path.write_bytes(b"ha")
        raise OSError("disk full")

    for content in (None, b"whole"):
        if content:
            atomic_write(str(path), lambda tmp_path: tmp_path.write_bytes(b"whole"))
        with pytest.raises(OSError, match="disk full"):
            atomic_write(path, fail)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [content] * bool(content)
