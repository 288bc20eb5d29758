"""pytest tests/test_data_lists.py -- list files of every format, and files that appear whole or not."""

import pytest
from PIL import Image

from data import Sample, atomic_write, read_list
from data.lists import read_texts


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
        ("l.csv", "a.jpg,0\nb c.jpg,+1\n# a comment\nd.jpg, \uff12,\n"),
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


@pytest.mark.parametrize("first, label", [("a.avif", "good"), ("sub/No Suffix", "1.5"),
                                          ("a.AVIF", "good"), ("b.avif", "0.5")])  # fmt: skip
def test_a_first_line_that_is_an_image_is_no_header(pictures, first, label):
    for name in ("a.avif", "sub/No Suffix", "good/x.jpg"):
        (pictures / name).parent.mkdir(exist_ok=True)
        (pictures / name).write_bytes((pictures / "a.jpg").read_bytes())
    (pictures / "l.csv").write_text(f"{first},{label}\na.jpg,{label}\n")
    if first == "b.avif":
        with pytest.raises(FileNotFoundError, match="l.csv: 1 of 2 images are not under"):
            read_texts(pictures / "l.csv", pictures)
    else:
        assert [text for _, text in read_texts(pictures / "l.csv", pictures)] == [label] * 2
    (pictures / "l.csv").write_text(f"good,{label}x\na.jpg,{label}\n")  # a folder is no image
    assert read_texts(pictures / "l.csv", pictures) == [("a.jpg", label)]


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
