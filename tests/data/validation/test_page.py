"""`validate`: the page with its pictures. Expectations come from how the files were made."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture

from tests.helpers.devtools import check_page
from umbrella_jax import console
from umbrella_jax.config.schema import AugmentConfig, DataConfig, ModalityConfig, ModelConfig, RunConfig
from umbrella_jax.data.validation import page as page_module
from umbrella_jax.data.validation.checks import validate
from umbrella_jax.data.validation.contents import ContentsReader
from umbrella_jax.data.validation.page import write_page
from umbrella_jax.data.voxels import open_voxels
from umbrella_jax.html import page as html_page
from umbrella_jax.html import slices

SHAPE = (6, 7, 5)


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def pictures(text):
    urls = re.findall(r'<img src="data:image/png;base64,([^"]+)"', text)
    return [np.asarray(Picture.open(BytesIO(base64.b64decode(url)))) for url in urls]


def test_page(config, ask, record, nifti, write_json, tokenizer, tmp_path):
    name = "<img src=x onerror=alert(1)>&'\".nii"
    nifti(name, SHAPE)
    nifti("run.nii", np.random.default_rng(0).uniform(1, 2, (4, 3, 5, 6)))
    turns = [
        ask("<b>gone.nii", task_id="</script><script>alert(2)</script>"),
        ask(name, "<i>male</i>", metadata={"task": "<u>sex</u>"}),
        record([("user", ["fMRI:run.nii"]), ("assistant", ["yes"])]),
        ask("run.nii", task_id="<script>"),
    ]
    settings = config(write_json("<s>train\udcff.json", turns))  # a name that is no UTF-8
    report = validate(settings, lambda: tokenizer)
    file = tmp_path / "page.html"
    write_page(report, settings.model.modalities, file, sample=24, threads=2, augment=settings.data.augment)
    text = file.read_text(encoding="utf-8")
    elements = Elements(text).found
    assert not {tag for tag, _ in elements} & {"link", "iframe", "object", "i", "u", "s"}
    assert [tag for tag, _ in elements].count("script") == 1
    assert not re.search(r"<b>(gone|\w*\.nii)|<script>[^\n]", text)
    assert all(not key.startswith("on") for _, attrs in elements for key in attrs)
    links = [attrs[key] for _, attrs in elements for key in ("src", "href", "srcset", "data") if key in attrs]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")) for link in links)
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert "url(" not in text
    assert "@import" not in text
    assert len(pictures(text)) == 3  # a volume, and of a run its first frame and its deviation
    assert "&lt;i&gt;male&lt;/i&gt;" in text
    assert html_page.PRIVACY in text.replace("&#39;", "'")
    assert "not found" in text
    assert text.index("not found") < text.index("<svg") < text.index("<article")


@pytest.fixture
def page_of_many(config, ask, nifti, write_json, tokenizer, tmp_path, monkeypatch):
    """`(file, report)`: a page of 8 volumes, of which one has other voxels and one is missing."""
    monkeypatch.setattr(page_module, "MOST_ROWS", 7)
    for i in range(7):
        nifti(f"sub-{i}.nii", np.random.default_rng(i).uniform(1, 2, SHAPE), np.diag([1, 1, 1 + (i == 5), 1]))
    sexes = ["male.", "female."]
    turns = [ask(f"sub-{i}.nii", sexes[i % 2], metadata={"task": "sex", "subject_id": str(i)}) for i in range(6)]
    settings = config(
        write_json("train.json", [*turns, ask("gone.nii", task_id="lost", metadata={"task": "sex"})]),
        write_json("eval.json", [ask("sub-6.nii", sexes[0], metadata={"task": "sex"})]),
    )
    report = validate(settings, lambda: tokenizer)
    file = tmp_path / "page.html"
    write_page(report, settings.model.modalities, file, sample=2, threads=2, augment=settings.data.augment)
    return file, report


def test_progress_is_printed(config, ask, nifti, write_json, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "INTERVAL", 0.0)
    lines = []
    turns = [ask(str(nifti(f"{i}.nii", SHAPE))) for i in range(3)]
    settings = config(write_json("train.json", turns))
    options = {"threads": 2, "augment": settings.data.augment, "say": lines.append}
    report = validate(settings, say=lines.append)
    write_page(report, settings.model.modalities, tmp_path / "page.html", sample=2, **options)
    assert [line.split("  ")[0] for line in lines] == [
        *(f"volume {i} of 3" for i in (1, 2, 3)),
        *(f"picture {i} of 2" for i in (1, 2)),
    ]


def test_the_page_lists_flagged_volumes_first_and_compares_sets(page_of_many, chromium):
    file, report = page_of_many
    check_page(chromium, file)
    with chromium.open(file.as_uri(), webgl=False) as tab:
        result = tab.run("""
        const cells = (id) => [...document.querySelectorAll(`#${id} tbody tr`)].map(row =>
          [...row.cells].map(cell => cell.innerText));
        const link = document.querySelector("#volumes a");
        const [counts] = document.querySelectorAll(".counts");
        return {volumes: cells("volumes"), conversations: cells("conversations"), findings: cells("findings"),
                caption: document.querySelector("#volumes caption").innerText,
                target: document.querySelector(link.getAttribute("href")).innerText,
                thumbnails: [...document.querySelectorAll("#volumes img")].map(image => image.naturalWidth > 100),
                answers: [...counts.rows].map(row => row.innerText.split("\t").map(text => text.trim())),
                titles: [...document.querySelectorAll(".chart figcaption b")].map(title => title.innerText)};
        """)
    assert [row[:2] for row in result["volumes"]] == [
        ["gone.nii", "fault"],
        ["sub-5.nii", "warning"],
        *([f"sub-{i}.nii", ""] for i in range(5)),
    ]
    assert result["volumes"][1][2].startswith("voxel size (mm) 1 × 1 × 2, 1 of 7 T1 volumes")
    assert result["volumes"][1][3:10] == ["train", "T1", "1", "6 × 7 × 5", "1 × 1 × 2", "", "RAS"]
    assert result["caption"].startswith("7 of 8 volumes, the worst first; paths start at /")
    assert "sub-5.nii" in result["target"]
    assert result["thumbnails"] == [True]
    assert len(result["findings"]) == len(report.findings)
    assert result["findings"][0][0] == "fault"
    assert len(result["conversations"]) == 7
    assert result["answers"] == [
        ["answer", "train (7)", "eval (1)"],
        ["male.", "4 (57 %)", "1 (100 %)"],
        ["female.", "3 (43 %)", "0 (0 %)"],
    ]
    assert {"conversations per subject", "positions per conversation", "mean of the voxels, as stored"} <= set(
        result["titles"]
    )


def test_the_page_shows_augmented_volumes(config, ask, nifti, write_json, tmp_path):
    nifti("a.nii", SHAPE)
    settings = config(write_json("train.json", ask("a.nii")), augment=AugmentConfig(left_right_flip=0.5, noise=0.2))
    file = tmp_path / "page.html"
    write_page(validate(settings), settings.model.modalities, file, sample=1, threads=1, augment=settings.data.augment)
    plain, flipped, noisy = pictures(file.read_text())
    assert "left_right_flip" in file.read_text()
    assert not np.array_equal(plain, flipped)
    assert not np.array_equal(plain, noisy)


def test_the_sample_is_even_and_starts_with_flagged_volumes(config, ask, nifti, write_json, tmp_path):
    for i in range(9):
        nifti(f"{i}.nii", SHAPE)
    nifti("seven.nii", np.full(SHAPE, 7.0))
    settings = config(write_json("train.json", [ask(f"{i}.nii") for i in [*range(9), "seven"]] + [ask("gone.nii")]))
    report = validate(settings)

    def drawn(sample):
        file = tmp_path / "page.html"
        file.unlink(missing_ok=True)  # an existing page is refused
        write_page(report, settings.model.modalities, file, sample=sample, threads=2, augment=settings.data.augment)
        return re.findall(r'<h3 class="path">[^<]*/([^<]*)\.nii</h3>', file.read_text())

    assert drawn(0) == []
    assert drawn(4) == ["seven", "0", "4", "8"]
    assert drawn(4) == drawn(4)
    assert sorted(drawn(99)) == sorted([*map(str, range(9)), "seven"])


@pytest.mark.parametrize("stored", ["RAS", "LPI", "SAR", "PIL"])
@pytest.mark.parametrize("orientation", ["RAS", "as_stored"])
def test_right_front_and_top_are_drawn_where_the_letters_are(nifti, write_json, ask, tmp_path, stored, orientation):
    voxels = np.zeros((20, 20, 20), np.float32)
    voxels[9:, 9:, 9:] = 1  # x to the right, y to the front, z up
    turn = nib.orientations.axcodes2ornt(stored)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)).as_reoriented(turn_from_ras(turn)), tmp_path / "a.nii")
    assert "".join(nib.aff2axcodes(nib.load(tmp_path / "a.nii").affine)) == stored
    modality = ModalityConfig(size=(20, 20, 20), patch=(5, 5, 5), orientation=orientation)
    settings = RunConfig(
        model=ModelConfig(modalities={"T1": modality}), data=DataConfig(train=str(write_json("t.json", ask("a.nii"))))
    )
    write_page(
        validate(settings),
        settings.model.modalities,
        tmp_path / "page.html",
        sample=1,
        threads=1,
        augment=settings.data.augment,
    )
    ((picture,), side, margin) = pictures((tmp_path / "page.html").read_text()), slices.LONGEST, slices.MARGIN
    assert picture.shape == (side + 2 * margin, 3 * (side + 2 * margin))
    for panel in np.split(picture, 3, axis=1):
        inner = panel[margin:-margin, margin:-margin].astype(float)
        quadrants = [q.mean() for half in np.array_split(inner, 2) for q in np.array_split(half, 2, axis=1)]
        assert quadrants[0] > 240  # top left: right and front, right and top, front and top
        assert max(quadrants[1:]) < 50


def turn_from_ras(to):
    return nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), to)


def test_letters():
    volume = np.zeros((2, 3, 4))
    letters = [plane.letters for plane in slices.cut_planes(volume, "LPS", None)]
    assert letters == [("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I")]
    assert slices.cut_planes(volume, None, None)[0].letters == ("+i", "-i", "+j", "-j")


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAR", None])
def test_planes_go_through_the_given_voxel(codes):
    volume = np.zeros((3, 4, 5))
    volume[2, 0, 3] = 1
    for plane in slices.cut_planes(volume, codes, None, at=(2, 0, 3)):
        assert plane.rows.sum() == 1
    assert not any(plane.rows.any() for plane in slices.cut_planes(volume, codes, None))


def test_a_map_is_overlaid_in_colour():
    volume, values = np.full((4, 4, 4), 0.5), np.zeros((4, 4, 4))
    values[0], values[3] = -1, 1
    planes = [slices.cut_planes(v, "RAS", None)[:1] for v in (volume, values)]
    picture = np.asarray(slices.draw_planes(planes[0], 0, 1, planes[1]), float)
    row = picture[picture.shape[0] // 2, slices.MARGIN : -slices.MARGIN]
    right, middle, left = row[5], row[len(row) // 2], row[-5]  # the patient's right is at the left
    assert right[0] > 150 > 100 > right[2]
    assert left[2] > 150 > 100 > left[0]
    assert len(set(middle)) == 1


@pytest.mark.parametrize("orientation", ["RAS", "as_stored"])
def test_planes_are_to_scale(nifti, orientation):
    # 20 x 30 x 10 voxels: 40 mm up, 30 mm to the left, 40 mm to the front
    affine = nib.affines.from_matvec(np.array([[0, -1, 0], [0, 0, 4], [2, 0, 0]]), [0, 0, 0])
    contents = ContentsReader(open_voxels(nifti("a.nii", (20, 30, 10), affine))).contents()
    stored = contents.orientation, contents.voxel_size, contents.shape
    config = ModalityConfig(size=(8, 8, 16), patch=(2, 2, 2), orientation=orientation)
    codes, spacing = slices.preprocessed_geometry(*stored, config)
    assert (codes, spacing) == (("RAS", (3.75, 5, 2.5)) if orientation == "RAS" else ("SLA", (5, 3.75, 2.5)))
    planes = slices.cut_planes(np.zeros(config.size), codes, spacing)
    assert [plane.mm for plane in planes] == [(30, 40), (30, 40), (40, 40)]
    padded = replace(config, mode="pad", spacing=2.5)
    assert slices.preprocessed_geometry(*stored, padded) == (codes, (2.5, 2.5, 2.5))
    run = replace(config, size=(8, 8, 16, 4), patch=(2, 2, 2, 2), scaling=None, mode=None)
    assert slices.preprocessed_geometry(*stored, run)[1] == (
        (1, 4, 2) if orientation == "RAS" else (2, 1, 4)
    )  # never resized
