"""Tiny releases in their original layout, own folders, and a few helpers for tests/test_data*.py."""

import hashlib
import io
from pathlib import Path

from PIL import Image

from data import Sample, Task


def jpeg(size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(buffer, "JPEG")
    return buffer.getvalue()


PICTURE = jpeg()


def paths(samples: tuple[Sample, ...]) -> set[str]:
    return {sample.path for sample in samples}


def parts_of(task: Task) -> tuple[tuple[Sample, ...], ...]:
    return task.train, task.val, task.test


def all_paths(task: Task) -> set[str]:
    return set().union(*map(paths, parts_of(task)))


def assert_disjoint(task: Task) -> None:
    train, val, test = map(paths, parts_of(task))
    assert not (train & val or train & test or val & test)


def write_files(root: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        (root / name).write_bytes(content)


def edit(path: Path, old: str, new: str) -> Path:
    """Replace old, which must be there, in a text file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


# ---------------------------------------------------------------------------------------- morph2

MORPH_TABLE = "morph_2008_nonCommercial.csv"
MORPH_HEADER = "id_num,picture_num,dob,doa,race,gender,facial_hair,age,age_diff,glasses,photo"


def morph_rows(people=40, photos=5):
    """(id, picture number, race, gender, age) of a small release; every 4th person is black."""
    return [
        (
            9000 + 7 * person,
            photo,
            "B" if person % 4 == 3 else "W",
            "MF"[person % 2],
            16 + (person * 3 + photo) % 50,
        )
        for person in range(people)
        for photo in range(photos)
    ]


def morph_name(person, photo, gender, age):
    return f"{person:06d}_{photo}{gender}{age:02d}.JPG"


def make_morph(root, rows=None, on_disk=lambda name: name):
    (root / "Album2").mkdir(parents=True)
    lines = [MORPH_HEADER]
    for person, photo, race, gender, age in rows or morph_rows():
        name = morph_name(person, photo, gender, age)
        (root / "Album2" / on_disk(name)).write_bytes(PICTURE)
        lines.append(
            f"{person},{photo},06/14/1951,12/04/2005,{race},{gender},,{age},{photo},,Album2/{name}"
        )
    (root / MORPH_TABLE).write_text("\r\n".join(lines) + "\r\n", newline="")
    return root


# --------------------------------------------------------------------------------------- adience

ADIENCE = (
    "user_id original_image face_id age gender x y dx dy tilt_ang fiducial_yaw_angle fiducial_score"
)
AGES = "(0, 2)|(4, 6)|(8, 12)|(15, 20)|(25, 32)|(38, 43)|(48, 53)|(60, 100)".split("|")
STRAYS = ["None", "35", "13", "(25, 23)", "(27, 32)", "(8, 23)", "3", "2"]


def adience_rows(fold):
    """(user, image, face, age): 3 users a fold, every age and stray, one row repeated."""
    rows = [
        (f"{fold}{i % 3}@N03", f"1039_{i}_o.jpg", str(i % 7), age)
        for i, age in enumerate(AGES * 5 + STRAYS)
    ]
    return rows + rows[:1]


def make_adience(root, tables=".", images="aligned", stem="landmark_aligned_face"):
    (root / tables).mkdir(parents=True, exist_ok=True)
    for fold in range(5):
        lines = ["\t".join(ADIENCE.split())]
        for user, image, face, age in adience_rows(fold):
            path = root / images / user / f"{stem}.{face}.{image}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PICTURE)
            lines.append("\t".join([user, image, face, age, "f", *"1234", "-115", "30", "17"]))
        text = "\r\n".join(lines) + "\r\n"
        (root / tables / f"fold_{fold}_data.txt").write_text(text, newline="")
    return root


# ------------------------------------------------------------------------------------ aesthetics

AESTHETICS_TABLE = "beauty-icwsm15-dataset.tsv"
CATEGORY_SIZES = {"nature": 101, "people": 40, "animals": 61, "urban": 21}
SCORES = {  # rank by median, by mean
    "1,2,3,3,2": (1, 1),
    "2,3": (1, 1),  # 2.5: down; to even
    "3,4": (2, 3),  # 3.5: down; to even
    "1,2,3,4": (1, 1),
    "5,5,5,5,1": (4, 3),
    "1, 1, 1, 1, 1": (0, 0),
    "4,4,4,4,5": (3, 3),
}


def aesthetic_rows():
    categories = [name for name, count in CATEGORY_SIZES.items() for _ in range(count)]
    scores = list(SCORES)
    return [(str(7_000_000 + i), name, scores[i % 7]) for i, name in enumerate(categories)]


def make_aesthetics(root, images="img_files", rows=None, missing=(), ending=".jpg"):
    (root / images).mkdir(parents=True, exist_ok=True)
    lines = ["#flickr_photo_id\tcategory\tbeauty_scores"]
    for photo, category, scores in rows or aesthetic_rows():
        lines.append(f"{photo}\t{category}\t{scores}")
        if photo not in missing:
            (root / images / f"{photo}{ending}").write_bytes(PICTURE)
    text = "\r\n".join(lines) + "\r\n"
    (root / AESTHETICS_TABLE).write_text(text, newline="")
    (root / images / "._7000000.jpg").write_bytes(b"")
    return root


# ------------------------------------------------------------------------------------------- hci

DECADES = ("1930s", "1940s", "1950s", "1960s", "1970s")
HCI = "HistoricalColor-ECCV2012/data/imgs/decade_database"


def make_hci(root, folder=HCI, counts=(265,) * 5):
    for decade, count in zip(DECADES, counts):
        decade_dir = root / folder / decade
        decade_dir.mkdir(parents=True)
        (decade_dir / "._decade_0.jpg").write_bytes(b"")
        (decade_dir / ".DS_Store").write_bytes(b"")
        for i in range(count):
            name = hashlib.md5(f"{decade}{i}".encode()).hexdigest()
            (decade_dir / f"decade_{name}.jpg").write_bytes(PICTURE)
    return root


MAKERS = dict(morph2=make_morph, adience=make_adience, aesthetics=make_aesthetics, hci=make_hci)

# -------------------------------------------------------------------------------------- own data


def tiny(path, color=(200, 100, 50), size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def make_folders(root, ranks, count=20):
    for rank in ranks:
        for i in range(count):
            tiny(root / rank / f"a {i}.{'jpg' if i % 2 else 'PNG'}")
    return root


def make_lists(root, ending=".txt", count=10):
    tables = dict(train=[], val=[], test=[])
    for part, rows in tables.items():
        for i in range(count):
            tiny(root / "some images" / f"{part} {i}.jpg")
            rows.append((f"some images/{part} {i}.jpg", i % 3))
        text = {
            ".txt": "".join(f"{path} {label}\n" for path, label in rows),
            ".csv": "path,label\n" + "".join(f'"{path}",{label}\n' for path, label in rows),
            ".tsv": "".join(f"{path}\t{label}\n" for path, label in rows),
        }[ending]
        (root / f"{part}{ending}").write_text(text)
    return root
