"""pytest tests/test_bad_data.py -- one table of bad lists, folders, tables, releases and options.

Each row: what lies in the folder or is asked for, and the whole message that the user reads.
"""

import pytest
from data_makers import AESTHETICS_TABLE, MAKERS, MORPH_TABLE, PICTURE, edit, write_files

import data
from data.__main__ import main

TWO = ["1/0.jpg", "1/1.jpg", "2/0.jpg", "2/1.jpg"]  # two ranks of two images
TEXTS = dict(  # what several messages have in common
    how="; name the ranks in {root}/ranks.txt, one a line, lowest first",
    wanted=" expected a folder per rank, lists train.txt (.csv, .tsv) of path and rank index, or one "
    "table (.csv, .tsv) with the columns path and label",
    dates="; labels are ranks, counted from 0: if these are dates or ids, write the rank in their "
    "place",
    ranks="; labels are ranks, counted from 0 (own images: see --ranks, --bins)",
    mind="mind case, suffix, accents",
    utf8="this is not UTF-8 text; save the file as UTF-8",
    missing="images are not under {root}, the first:",
    either="each of the columns score, age may be the label; name one of them `label`",
    comment=", but there is such an image; write ./ before it, or remove the line",
    parts="; write train, val and test, or give the column another name",
    columns="expected two columns, or a header that names one `path` and one `label`, separated by",
)

BESIDE = (
    ", but folders lie beside it: for the labels of the table give --train-list {table} --ranks "
    "present, else move it away"
)


def folders(*ranks: str) -> list[str]:
    return [f"{rank}/{i}.jpg" for rank in ranks for i in range(3)]


OWN = [  # (images, {file: content}, message)
    (TWO, {"train.txt": "1/0.jpg 0\n1/1.jpg\n"},
     "{root}/train.txt:2: expected an image path and a label, got '1/1.jpg'"),
    (TWO, {"train.txt": "# x\n\n1/0.jpg,1\n"},
     "{root}/train.txt:3: expected an image path and a label, got '1/0.jpg,1'"),
    (TWO, {"train.txt": "1/0.jpg one\n"},
     "{root}/train.txt:1: label 'one' is no whole number{ranks}"),
    (TWO, {"train.txt": "1/0.jpg 1.5\n"},
     "{root}/train.txt:1: label '1.5' is no whole number{ranks}"),
    (TWO, {"train.txt": "1/0.jpg inf\n"},
     "{root}/train.txt:1: label 'inf' is no whole number{ranks}"),
    (TWO, {"train.txt": "1/0.jpg 0\n1/1.jpg -1\n"},
     "{root}/train.txt:2: label -1, but ranks are counted 0"),
    (TWO, {"train.txt": "1/0.jpg \xb2\n"},
     "{root}/train.txt:1: label '\xb2' is no whole number{ranks}"),
    (TWO, {"train.txt": "1/0.jpg 0\n1/1.jpg 2\n", "ranks.txt": "low\nhigh\n"},
     "{root}/train.txt:2: label 2, but ranks are counted 0 .. 1 (2 ranks)"),
    (TWO, {"train.txt": "\n# only words\n"},
     "{root}/train.txt lists no image; expected lines `path label`"),
    (TWO, {"train.csv": "path,label\n"},
     "{root}/train.csv lists no image; expected lines `path label`"),
    (TWO, {"train.csv": "path,label\n1/0.jpg\n"},
     "{root}/train.csv:2: expected an image path and a label, got '1/0.jpg'"),
    (TWO, {"train.csv": "path,label\n,1\n"},
     "{root}/train.csv:2: expected an image path and a label, got ',1'"),
    (TWO, {"train.csv": "path,label\n1/0.jpg,\n"},
     "{root}/train.csv:2: expected an image path and a label, got '1/0.jpg,'"),
    (TWO, {"train.csv": "1/0.jpg,x\n"},
     "{root}/train.csv:1: label 'x' is no whole number{ranks}"),
    (TWO, {"train.csv": "name,x,y\n1/0.jpg,1,2\n"},
     "{root}/train.csv:1: {columns} ','; got 'name,x,y'"),
    (TWO, {"train.csv": "1/0.jpg;0\n1/1.jpg;1\n"},
     "{root}/train.csv:1: {columns} ','; got '1/0.jpg;0'"),
    (TWO, {"train.tsv": "1/0.jpg 0\n1/1.jpg 1\n"},
     "{root}/train.tsv:1: {columns} '\\t'; got '1/0.jpg 0'"),
    (TWO, {"train.csv": '"1/0.jpg,0\n'},
     "{root}/train.csv:1: {columns} ','; got '\"1/0.jpg,0'"),
    (TWO, {"train.txt": "1/0.jpg 0\n1/0.jpg 1\n"},
     "{root}/train.txt:2: 1/0.jpg has label 1, but {root}/train.txt:1 says 0"),
    (TWO, {"train.txt": "1/0.jpg 0\n2/../1/./0.jpg 1\n"},
     "{root}/train.txt:2: 1/0.jpg has label 1, but {root}/train.txt:1 says 0"),
    (TWO, {"train.txt": "1/0.jpg 0\n1/1.jpg 1\n", "test.txt": "2/../1/1.jpg 0\n"},
     "{root}/test.txt: 1/1.jpg has label 0, but {root}/train.txt says 1"),
    (TWO, {"train.txt": "1/0.jpg 20240131\n1/1.jpg 20240201\n"},
     "{root}: 20,240,202 ranks, expected at most 2{dates}"),
    (TWO, {"train.txt": "1/0.jpg 3\n1/1.jpg 1\n"},
     "{root}: 4 ranks, expected at most 2{dates}"),
    (TWO, {"train.txt": "1/0.jpg 1234567890123456789\n"},
     "{root}: 1,234,567,890,123,456,790 ranks, expected at most 1{dates}"),
    (TWO, {"train.txt": "1/0.jpg 12345678901234567890\n"},
     "{root}/train.txt:1: label 12345678901234567890, but ranks are counted 0"),
    (TWO, {"train.txt": "1/0.jpg 0\n1/1.jpg 0\n"},
     "{root}: 1 rank, but ordinal regression needs 2 or more"),
    (TWO, {"train.txt": b'1/0.jpg 0\n1/\xe9.jpg 1\n'},
     "{root}/train.txt:2: {utf8}"),
    (TWO, {"train.txt": b'\xff\xfe1\x00/\x000\x00.\x00j\x00p\x00g\x00 \x000\x00\n\x00'},
     "{root}/train.txt:1: {utf8}"),
    (TWO, {"train.txt": b'1\x00/\x000\x00.\x00j\x00p\x00g\x00 \x000\x00\n\x00'},
     "{root}/train.txt:1: {utf8}"),
    (TWO, {"train.txt": b'1/0.jpg 0\n1/\x00.jpg 1\n'},
     "{root}/train.txt:2: {utf8}"),
    (TWO, {"ranks.txt": b'low\nh\xf6her\n'},
     "{root}/ranks.txt:2: {utf8}"),
    (TWO, {"train.txt": "1/0.jpg 0\n1/x.jpg 1\n2/y.jpg 1\n"},
     "{root}/train.txt: 2 of 3 {missing} '1/x.jpg', '2/y.jpg' ('{root}/1' holds no 'x.jpg')"),
    (TWO, {"train.txt": "3/0.jpg 0\n"},
     "{root}/train.txt: 1 of 1 {missing} '3/0.jpg' ('{root}' holds no '3')"),
    (TWO, {"train.txt": "1\\0.jpg 0\n"},
     "{root}/train.txt: 1 of 1 {missing} '1\\\\0.jpg' (write / where the list has a backslash)"),
    (TWO, {"train.txt": "1/0 0\n"},
     "{root}/train.txt: 1 of 1 {missing} '1/0' (there is '{root}/1/0.jpg': {mind})"),
    (TWO, {"train.txt": "1/0.png 0\n"},
     "{root}/train.txt: 1 of 1 {missing} '1/0.png' (there is '{root}/1/0.jpg': {mind})"),
    (["A/X Y.JPG"], {"train.txt": "a/X Y.JPG 0\n"},
     "{root}/train.txt: 1 of 1 {missing} 'a/X Y.JPG' (there is '{root}/A': {mind})"),
    (["A/X Y.JPG"], {"train.txt": "A/x y.jpg 0\n"},
     "{root}/train.txt: 1 of 1 {missing} 'A/x y.jpg' (there is '{root}/A/X Y.JPG': {mind})"),
    (["caf\u00e9/0.jpg"], {"train.txt": "cafe\u0301/0.jpg 0\n"},
     "{root}/train.txt: 1 of 1 {missing} 'cafe\\u0301/0.jpg' (there is '{root}/caf\\xe9': {mind})"),
    (TWO, {"train.txt": "0.jpg 0\n"},
     "{root}/train.txt: 1 of 1 {missing} '0.jpg' (there is '{root}/1/0.jpg')"),
    (["1", "2"], {"train.txt": "1 0\n2 1\n"},
     "own: 2 train / 0 val / 0 test images, and none may be empty; give more images or lists"),
    (TWO, {"train.txt": "1/0.jpg 0\n", "train.csv": "1/0.jpg,0\n"},
     "{root}/train.csv and train.txt are both the train part; keep one"),
    (TWO, {"val.txt": "1/0.jpg 0\n1/1.jpg 1\n"},
     "own: there is no list or folder of training images; give one"),
    (TWO, {"train.txt": "1/0.jpg 0\n1/1.jpg 1\n", "eval.txt": "2/0.jpg 0\n"},
     "{root}/eval.txt: is it the val or the test part? rename it to that"),
    (TWO, {"train.txt": "1/0.jpg 0\n1/1.jpg 1\n"},
     "own: 2 train / 0 val / 0 test images, and none may be empty; give more images or lists"),
    ([], {},
     "{root} holds 0 folders and 0 tables;{wanted}"),
    ([], {"readme.txt": "x"},
     "{root} holds 0 folders and 0 tables;{wanted}"),
    (["0.jpg", "1.jpg"], {},
     "{root} holds 0 folders and 0 tables;{wanted}"),
    (folders("images"), {},
     "{root} holds 1 folders and 0 tables;{wanted}; if images holds the ranks, give {root}/images"),
    (folders("data/1", "data/2"), {},
     "{root} holds 1 folders and 0 tables;{wanted}; if data holds the ranks, give {root}/data"),
    (folders("7"), {},
     "{root} holds 1 folders and 0 tables;{wanted}; if 7 holds the ranks, give {root}/7"),
    (folders("good", "bad"), {},
     "{root}: the order of rank 'bad' is not known{how}"),
    (folders("1", "bad"), {},
     "{root}: the order of rank 'bad' is not known{how}"),
    (folders("1 a", "1 b"), {},
     "{root}: the order of rank '1 a' is not known{how}"),
    (folders("rank 1", "level 2"), {},
     "{root}: the order of rank 'rank 1' is not known{how}"),
    (folders("2024-01-31", "2024-02-01"), {},
     "{root}: the order of rank '2024-01-31' is not known{how}"),
    (folders("3 months", "2 years"), {},
     "{root}: the ranks '2 years' and '3 months' have different units{how}"),
    (folders("1-2 years", "6 months"), {},
     "{root}: the ranks '1-2 years' and '6 months' have different units{how}"),
    (folders("3kg", "500 g"), {},
     "{root}: the ranks '3kg' and '500 g' have different units{how}"),
    (folders("10k", "500"), {},
     "{root}: the ranks '10k' and '500' have different units{how}"),
    (folders("18m", "2y"), {},
     "{root}: the ranks '18m' and '2y' have different units{how}"),
    (folders("6 months", "2", "1"), {},
     "{root}: the ranks '2' and '6 months' have different units{how}"),
    *((folders(a, b), {}, f"{{root}}: the ranks {a!r} and {b!r} have different units{{how}}")
      for a, b in (("1 s", "500 ms"), ("1 mm", "10 um"), ("1 l", "500 ml"), ("1 ft", "2 inches"),
                   ("1 decade", "5 years"), ("1M", "500"), ("1 B", "500 M"), ("1pm", "9am"),
                   ("10 AD", "20 BC"), ("1 AD", "2 BC"), ("1 bad", "3 good"), ("1k-2k", "900-1k"))),
    *((folders(a, b), {}, f"{{root}}: the order of rank {a!r} is not known{{how}}")
      for a, b in (("minus 2", "minus 5"), ("00s", "60s"), ("0,125", "1,5"),
                            ("1,5", "2"))),
    *((folders(a, b), {}, f"{{root}}: is rank {a!r} below {b!r}?{{how}}")
      for a, b in (("Q1 2021", "Q2 2020"), ("1-2021", "12-2020"))),
    (folders("fold_1", "fold_2"), {},
     "{root}: 'fold_1' may be a part or a rank{how}"),
    (folders("1/Train", "1/test", "2/Train"), {},
     "{root}/1/Train: the parts come first; expected {root}/Train/1"),
    (folders("good", "bad"), {"ranks.txt": "good\n"},
     "{root}: the order of rank 'bad' is not known{how}"),
    (folders("good", "bad"), {"ranks.txt": "good\nbad\ngood\n"},
     "{root}/ranks.txt names a rank twice; give one name a line, lowest rank first"),
    (["1/0.jpg", "2/0.jpg"], {},
     "own: 2 train / 0 val / 0 test images, and none may be empty; give more images or lists"),
    (folders("1", "2") + ["1/a\nb.jpg"], {},
     "the file name '1/a\\nb.jpg' holds a line break; rename the file"),
    (folders("1", "2") + ["1/a\udce9.jpg"], {},
     "the file name '1/a\\udce9.jpg' is not UTF-8 text; rename the file"),
    (folders("1", "2") + ["2/a.jpg "], {},
     "the file name '2/a.jpg ' starts or ends with a space; rename the file"),
    (folders("train/1", "train/2", "val/1", "Valid/1"), {},
     "{root}/Valid and val are both the val part; keep one"),
    (folders("train/1", "train/2", "eval/1"), {},
     "{root}/eval: is it the val or the test part? rename it to that"),
    (folders("train/1", "train/2", "val/1", "test/1", "evaluation/1"), {},
     "{root}/evaluation: is it the val or the test part? rename it to that"),
    (folders("test/1", "test/2"), {},
     "own: there is no list or folder of training images; give one"),
    (folders("train"), {},
     "{root}/train holds 0 folders and 0 tables;{wanted}"),
    (folders("1", "2"), {"ranks.txt": "\n".join(map(str, range(10_001)))},
     "{root}: 10,001 ranks, expected at most 10,000{dates}"),
    (["0.jpg", "1.jpg"], {"labels.csv": "path,label\n0.jpg,1\n1.jpg,bad\n"},
     "{root}: the order of rank 'bad' is not known{how}"),
    (["0.jpg", "1.jpg"], {"labels.csv": "path,label\n0.jpg,3,5\n1.jpg,4\n"},
     "{root}/labels.csv:2: expected an image path and a label, got '0.jpg,3,5'"),
    (["0.jpg", "1.jpg"], {"labels.csv": "path,label\n0.jpg,1\n1.jpg,\n"},
     "{root}/labels.csv:3: expected an image path and a label, got '1.jpg,'"),
    (["0.jpg", "1.jpg"], {"labels.csv": "id,x,y\n0.jpg,1,2\n"},
     "{root}/labels.csv:1: {columns} ','; got 'id,x,y'"),
    (["0.jpg", "1.jpg"], {"labels.csv": "path,label\n0.jpg,1\n0.jpg,2\n"},
     "{root}/labels.csv:3: 0.jpg has label 2, but {root}/labels.csv:2 says 1"),
    (["0.jpg", "1.jpg"], {"labels.csv": "path,label\n0,1\n1,2\n"},
     "{root}/labels.csv: 2 of 2 {missing} '0', '1' (there is '{root}/0.jpg': {mind})"),
    (["a/0.jpg", "a/1.jpg"], {"labels.csv": "path,label\n0.jpg,1\n1.jpg,2\n"},
     "{root}/labels.csv: 2 of 2 {missing} '0.jpg', '1.jpg' (there is '{root}/a/0.jpg')"),
    (["0.jpg", "1.jpg"], {"a.csv": "path,label\n", "b.csv": "path,label\n"},
     "{root} holds 0 folders and 2 tables;{wanted}"),
    (["train/0.jpg", "train/1.jpg"], {"train/metadata.csv": "file_name,label\n0.jpg,1\n2.jpg,2\n"},
     "{root}/train/metadata.csv: 1 of 2 images are not under {root}/train, the first: '2.jpg' "
     "('{root}/train' holds no '2.jpg')"),
    (folders("a", "b"), {"labels.csv": "path,size\na/0.jpg,1\n"},
     "{root}: the order of rank 'a' is not known{how}"),
    (folders("a", "b"), {"labels.csv": "path,label\na/0.jpg,1\n"},
     "{root}: 1 rank, but ordinal regression needs 2 or more"),
    (folders("001", "2"), {"x.csv": "path,label\n001/0.jpg,25\n2/0.jpg,\n"},
     "{root}/x.csv:3: expected an image path and a label, got '2/0.jpg,'"),
    (folders("1", "2", "unsorted"), {"x.csv": "file,width,score\n1/0.jpg,8,5\n2/0.jpg,8,7\n"},
     "{root}: the order of rank 'unsorted' is not known{how}"),
    (["train/0.jpg", "test/1.jpg"], {"x.csv": "path,label\ntrain/0.jpg,1\ntest/1.jpg,2\n"},
     "{root}/x.csv has the labels, but not the parts, which are folders; add a column split of "
     "train, val and test, or make train.csv, val.csv and test.csv"),
    (folders("part1", "part2"), {}, "{root}: 'part1' may be a part or a rank{how}"),
    (["a/0.jpg", "a/1.jpg"], {"train_list.txt": "a/0.jpg 0\n", "test_list.txt": "a/1.jpg 1\n"},
     "{root} holds 1 folders and 0 tables;{wanted}; if a holds the ranks, give {root}/a; not "
     "read: test_list.txt, train_list.txt"),
    (["0.jpg", "1.jpg"], {"metadata.jsonl": "{}"},
     "{root} holds 0 folders and 0 tables;{wanted}; not read: metadata.jsonl"),
    (folders("001", "2"), {"labels.csv": "path,label,person\n001/0.jpg,1,a\n2/0.jpg,25,b\n"},
     "{root}/labels.csv says '25' of 2/0.jpg{beside}"),
    (folders("001", "2"), {"labels.csv": "file,age\n0.jpg,25\n"},
     "{root}/labels.csv says '25' of 0.jpg{beside}"),
    (folders("train/1", "train/2"), {"train/x.tsv": "file\tage\n1/0.jpg\t2\n"},
     "{root}/train/x.tsv says '2' of 1/0.jpg{beside}"),
    (["#0/x.jpg", *TWO], {"train.txt": "1/0.jpg 0\n#0/x.jpg 1\n"},
     "{root}/train.txt:2: '#0/x.jpg 1' is a comment{comment}"),
    (["#0/x y.jpg", *TWO], {"train.csv": "#0/x y.jpg,1\n1/0.jpg,0\n"},
     "{root}/train.csv:1: '#0/x y.jpg,1' is a comment{comment}"),
    (TWO, {"train.csv": "image,score,age\n1/0.jpg,1,30\n2/0.jpg,2,40\n"},
     "{root}/train.csv:1: {either}"),
    (["0.jpg", "1.jpg"], {"labels.csv": "image,score,age\n0.jpg,1,30\n1.jpg,2,40\n"},
     "{root}/labels.csv:1: {either}"),
    (TWO, {"train.csv": "path,label,split\n1/0.jpg,0,train\n1/1.jpg,1,test\n"},
     "{root}/train.csv: column split names other parts than this list; make train.csv, val.csv, "
     "test.csv"),
    (["train/0.jpg", "train/1.jpg"],
     {"train/a.csv": "path,label,split\n0.jpg,0,train\n1.jpg,1,val\n"},
     "{root}/train/a.csv: column split names other parts than this list; make train.csv, val.csv, "
     "test.csv"),
    (["0.jpg", "1.jpg"], {"a.csv": "path,label,fold\n0.jpg,0,train\n1.jpg,1,extra\n"},
     "{root}/a.csv: column fold has 'extra', no name of a part{parts}"),
    (["0.jpg", "1.jpg"], {"a.csv": "path,label,split\n0.jpg,0,train set\n1.jpg,1,test set\n"},
     "{root}/a.csv: column split has 'train set', no name of a part{parts}"),
]  # fmt: skip


@pytest.mark.parametrize("images, files, message", OWN)
def test_own_images(tmp_path, images, files, message):
    root = tmp_path / "own"
    root.mkdir()
    write_files(root, dict.fromkeys(images, PICTURE) | files)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        data.load(root)
    if "{beside}" in message:
        table = message.split(" says ")[0]
        message = message.replace("{beside}", BESIDE.format(table=table))
    message = message.replace("?{how}", "?" + TEXTS["how"][1:])
    for name, text in TEXTS.items():
        message = message.replace(f"{{{name}}}", text)
    assert str(error.value) == message.replace("{root}", str(root))


TABLES = {  # file, and what its messages have in common
    "morph2": (MORPH_TABLE, "an age of 0 .. 100 and a photo such as Album2/009055_1M54.JPG"),
    "adience": ("fold_2_data.txt", "user_id, original_image, face_id, age"),
    "aesthetics": (
        AESTHETICS_TABLE,
        "a photo id, a category (nature, people, animals, urban) and scores such as 3,2,4 of 1 .. 5",
    ),
}
RELEASES = [  # (dataset, what is replaced in its table, by what, message)
    ("morph2", ",16,0,,Album2", ",17,0,,Album2",
     "{table}:2: age 17, but the name of Album2/009000_0M16.JPG says 16"),
    ("morph2", ",16,0,,Album2", ",,0,,Album2",
     "{table}:2: {expected} '' and 'Album2/009000_0M16.JPG'"),
    ("morph2", ",16,0,,Album2", ",x,0,,Album2",
     "{table}:2: {expected} 'x' and 'Album2/009000_0M16.JPG'"),
    ("morph2", ",16,0,,Album2", ",160,0,,Album2",
     "{table}:2: {expected} '160' and 'Album2/009000_0M16.JPG'"),
    ("morph2", ",16,0,,Album2/009000_0M16.JPG", ",16,0,,face.JPG",
     "{table}:2: {expected} '16' and 'face.JPG'"),
    ("morph2", ",16,0,,Album2/009000_0M16.JPG", ",16",
     "{table}:2: {expected} '16' and ''"),
    ("morph2", "race,", "ethnicity,",
     "{table}:1: no column race; expected the header of the release, got {header!r}"),
    ("morph2", "age,age_diff", "years,age_diff",
     "{table}:1: no column age; expected the header of the release, got {header!r}"),
    ("morph2", "glasses,photo", "glasses,picture",
     "{table}:1: no column photo; expected the header of the release, got {header!r}"),
    ("adience", "\tface_id\t", "\tface\t",
     "{table}:1: no column face_id; expected the header of the release, got {header!r}"),
    ("adience", "20@N03\t1039_0_o.jpg\t0", "20@N03\t\t0",
     "{table}:2: {expected} '20@N03', '', '0', '(0, 2)'\n{table}:50: {expected} '20@N03', '', '0', '(0, 2)'"),
    ("aesthetics", "#flickr_photo_id", "#id",
     "{table}:1: no column flickr_photo_id; expected the header of the release, got {header!r}"),
    ("aesthetics", "7000001\tnature", "7000001\tsea",
     "{table}:3: {expected} '7000001', 'sea', '2,3'"),
    ("aesthetics", "7000001\tnature\t2,3", "7000001\tnature\t2,6",
     "{table}:3: {expected} '7000001', 'nature', '2,6'"),
    ("aesthetics", "7000001\tnature\t2,3", "7000001\tnature",
     "{table}:3: {expected} '7000001', 'nature', ''"),
]  # fmt: skip


@pytest.mark.parametrize("name, old, new, message", RELEASES)
def test_releases(tmp_path, name, old, new, message):
    file, expected = TABLES[name]
    table = edit(MAKERS[name](tmp_path) / file, old, new)
    header = table.read_text().split("\n")[0]
    with pytest.raises(ValueError) as error:
        data.load(name, tmp_path)
    texts = dict(table=table, header=header, expected=f"expected {expected}, got")
    assert str(error.value) == message.format(**texts)


@pytest.mark.parametrize(
    "num_groups, counts", [(1, "0 train / 0 val / 6"), (2, "0 train / 3 val / 3")]
)
def test_fewer_groups_than_parts(tmp_path, num_groups, counts):
    lines = ["path,label,who", *(f"{i}.jpg,{i // 2},{i % num_groups}" for i in range(6))]
    images = {f"{i}.jpg": PICTURE for i in range(6)}
    write_files(tmp_path, images | {"labels.csv": "\n".join(lines)})
    with pytest.raises(ValueError) as error:
        data.load(tmp_path, group="who")
    assert str(error.value) == (
        f"{tmp_path.name}: {counts} test images, and none may be empty: {num_groups} groups are "
        "too few, train, val and test need one each"
    )


@pytest.mark.parametrize("argv, message", [
    ([""], "name is empty; give a value"),
    (["{root}", "--data-root="], "data-root is empty; give a value"),
    (["{root}", "--out={root}"], "--out {root} lies in {root}, where folders are data; give another"),
    (["{root}", "--out={root}/1/x"], "--out {root}/1/x lies in {root}, where folders are data; give another"),
])  # fmt: skip
def test_bad_commands(tmp_path, capsys, argv, message):
    write_files(tmp_path, {f"{rank}/{i}.jpg": PICTURE for rank in (1, 2) for i in range(9)})
    assert main([word.replace("{root}", str(tmp_path)) for word in argv]) == 1
    assert capsys.readouterr().err == f"error: {message.replace('{root}', str(tmp_path))}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


OPTIONS = [  # (dataset, options, message)
    ("/", dict(fold=-1), "{root} has no fold -1; give a number from 0"),
    ("adience", dict(fold=5), "adience has no fold 5; give 0 .. 4"),
    ("adience", dict(fold=-1), "adience has no fold -1; give 0 .. 4"),
    ("aesthetics", dict(fold=5), "aesthetics has no fold 5; give 0 .. 4"),
    ("hci", dict(fold=10), "hci has no fold 10; give 0 .. 9"),
    ("adience", dict(split="random"), "adience has no split 'random'; give five-fold"),
    ("hci", dict(split="five-fold"), "hci has no split 'five-fold'; give random"),
    ("adience", dict(label_rule="mean"),
     "adience has no label_rule 'mean'; give exact or merged or inside"),
    ("aesthetics", dict(label_rule="exact"), "aesthetics has no label_rule 'exact'; give median or mean"),
    ("aesthetics", dict(category="sea"),
     "aesthetics has no category 'sea'; give all or nature or animal or urban or people"),
    ("hci", dict(category="all"), "hci has no category, got 'all'; leave it out"),
    ("hci", dict(label_rule="mean"), "hci has no label_rule, got 'mean'; leave it out"),
    ("adience", dict(category=""), "adience has no category, got ''; leave it out"),
    ("morph2", dict(label_rule="exact"), "morph2 has no label_rule, got 'exact'; leave it out"),
    ("morph2", dict(split="rand"), "morph2 has no split 'rand'; give random or subject-exclusive"),
    ("morph", {}, "there is no dataset or folder 'morph'; give adience, aesthetics, demo, hci, morph2 or "
     "a folder of own data"),
    ("/", dict(split="subject-exclusive"), "{root} has no split 'subject-exclusive'; give random or leave-one-group-out"),
    ("/", dict(category="all"), "{root} has no category, got 'all'; leave it out"),
    *(("hci", {option: "3"}, f"hci has no {option}, got '3'; leave it out")
      for option in ("label_pattern", "ranks", "bins", "group")),
    ("demo", dict(lists=("a.txt", None, None)),
     "the demo has lists of its own; leave yours out, or load its folder"),
]  # fmt: skip


@pytest.mark.parametrize("name, options, message", OPTIONS)
def test_options_that_a_dataset_does_not_have(tmp_path, name, options, message):
    with pytest.raises(ValueError) as error:
        data.load(tmp_path if name == "/" else name, tmp_path, **options)
    assert str(error.value) == message.replace("{root}", str(tmp_path))
