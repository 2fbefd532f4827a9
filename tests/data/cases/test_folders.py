"""Folders as people have them: splits are splits, masks are no pictures, what systems leave behind is passed over."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from picture_files import picture
from PIL import Image
from tar_files import samples, write_tar

from torchmae.data.folders import roles, split_named
from torchmae.data.formats import FORMATS
from torchmae.data.layouts import folder_splits, open_splits
from torchmae.data.sources import FileSource


def opened(folder: Path) -> dict[str, list[str]]:
    splits = folder_splits(folder)
    return {split: [os.path.relpath(item.name(i), folder) for i in range(len(item))] for split, item in splits.items()}


def remarks(folder: Path) -> str:
    return "; ".join(folder_splits(folder)["train"].remarks)


@pytest.mark.parametrize(
    ("layout", "others"),
    [
        ("{split}2017/{i}.png", ()),
        ("images/{split}/{i}.png", ("labels/{split}/{i}.txt",)),
        ("{split}/images/{i}.png", ("{split}/labels/{i}.txt",)),
        ("{split}/images/{i}.png", ("{split}/masks/{i}.png",)),
        ("images/{split}/{i}.png", ("annotations/{split}/{i}.png",)),
        ("{split}/{i}.png", ("{split}_masks/{i}_mask.png",)),
        ("{split}/{i}.png", ("{split}annot/{i}.png",)),
        ("{split}_images/{i}.png", ("{split}_labels/{i}.png",)),
        ("leftImg8bit/{split}/aachen/{i}.png", ("gtFine/{split}/aachen/{i}.png",)),
        ("wrapped/data/{split}/{i}.png", ("wrapped/data/readme_{split}.md",)),
        ("{split}ing_set/{i}.png", ()),
    ],
)
def test_splits(write_pictures, tmp_path: Path, layout: str, others: tuple[str, ...]) -> None:
    words = ("train", "test") if "ing_set" in layout else ("train", "val", "test")
    names = {split: sorted(layout.format(split=split, i=i) for i in range(2)) for split in words}
    write_pictures(*(name for part in names.values() for name in part))
    for other in others:
        extra = [other.format(split=split, i=i) for split in words for i in range(2)]
        write_pictures(*(name for name in extra if name.endswith(".png")))
        for name in extra:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
    assert opened(tmp_path) == names
    said = remarks(tmp_path)
    assert f"splits {'/'.join(words)} found" in said
    assert ("masks" in said) == any(other.endswith(".png") for other in others)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("x{i}.jpg", "x{i}_mask.png"),
        ("benign ({i}).png", "benign ({i})_mask_1.png"),
        ("images/x{i}.jpg", "masks/x{i}.png"),
        ("images/ant/x{i}.jpg", "masks_myelin/ant/x{i}.png"),
        ("JPEGImages/x{i}.jpg", "SegmentationClass/x{i}.png"),
        ("x{i}.jpg", "mask/x{i}.png"),
        ("Ok/images/x{i}.png", "Ok/masks/x{i}.png"),
        ("input/x{i}.tif", "GroundTruth/x{i}_gt.tif"),
    ],
)
def test_masks_are_not_trained_on_and_are_found_again(write_pictures, tmp_path: Path, image: str, mask: str) -> None:
    images, masks = ([name.format(i=i) for i in range(3)] for name in (image, mask))
    write_pictures(*images, *masks)
    assert opened(tmp_path) == {"train": images}
    assert "3 masks (" in remarks(tmp_path)
    source = folder_splits(tmp_path)["train"]
    assert isinstance(source, FileSource) and source.masks is not None
    assert [source.masks.of(source.name(i)) for i in range(3)] == [tmp_path / name for name in masks]
    assert source.masks.of("elsewhere/none.png") is None


def test_words_that_mean_no_mask_and_no_split(write_pictures, tmp_path: Path) -> None:
    """Classes called so: people with and without a mask; a train beside a bus."""
    write_pictures("a/mask/1.png", "a/no_mask/1.png", "b/vehicles/train/1.png", "b/vehicles/bus/1.png", "c/x_mask.png")
    assert opened(tmp_path / "a") == {"train": ["mask/1.png", "no_mask/1.png"]}
    assert folder_splits(tmp_path / "a")["train"].classes == ("mask", "no_mask")
    assert len(opened(tmp_path / "b")["train"]) == 2
    assert opened(tmp_path / "c") == {"train": ["x_mask.png"]}
    assert [split_named(word) for word in ("Train2017", "test_set", "imagesTr", "tr", "trained", "testes")] == [
        "train", "test", "train", "", "", "",
    ]  # fmt: skip


def test_classes_above_and_below_the_split() -> None:
    labels = {place: role.label for place, role in zip(PLACES, roles(PLACES), strict=True)}
    assert labels["bottle/train/good"] == "bottle" and labels["cable/test/bent"] == "cable"
    assert labels["bottle/ground_truth/bent"] is None
    assert [role.split for role in roles(PLACES)] == ["train", "test", "", "train", "test"]
    assert [role.label for role in roles(["images/train/cat", "images/train/dog", "labels/train/cat"])] == [
        "cat", "dog", None,
    ]  # fmt: skip


PLACES = ["bottle/train/good", "bottle/test/bent", "bottle/ground_truth/bent", "cable/train/good", "cable/test/bent"]


def test_what_is_beside_the_splits_or_of_another_kind_is_said(write_pictures, tmp_path: Path) -> None:
    write_pictures("a/train/1.png", "a/extra/1.png", "a/2.png", "b/test/1.png", "b/more/1.png", "c/x.png", "c/x.jpg")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / "README").touch()
    said = remarks(tmp_path / "a")
    assert "2 images beside the splits (./, extra/) not used" in said
    assert "1 without suffix, 1 .txt not used" in said
    assert "test/ is trained on" in remarks(tmp_path / "b")
    assert "1 images share name and folder" in remarks(tmp_path / "c")


def test_lists_of_splits_beside_the_images_are_named(write_pictures, tmp_path: Path) -> None:
    write_pictures("images/1.png", "images/2.png")
    (tmp_path / "train.txt").write_text("images/1.png")
    (tmp_path / "test.csv").write_text("images/2.png")
    assert "lists train.txt, test.csv not used, so that all images are trained on" in remarks(tmp_path)


def test_shards_in_folders_called_by_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "test" / split).mkdir(parents=True)
        write_tar(tmp_path / "test" / split / "00000.tar", samples(2))
    write_tar(tmp_path / "test" / "extra.tar", samples(1))
    splits = open_splits(str(tmp_path / "test"))
    assert {split: len(item) for split, item in splits.items()} == {"train": 2, "val": 2}
    assert splits["train"].remarks == ("1 files beside the splits (extra.tar) not used",)
    alone = open_splits(f"{tmp_path}/test/val/*.tar")["train"]
    assert (len(alone), alone.remarks) == (2, ())


def test_what_systems_leave_behind(write_pictures, tmp_path: Path) -> None:
    junk = ("$RECYCLE.BIN/S-1/$R1.png", "@eaDir/1.jpg/SYNOFILE_THUMB_M.jpg", "lost+found/1.png", "#recycle/1.png")
    write_pictures("ant/1.png", "bee/2.png", "ant/._1.png", "bee/._2.png", ".thumbnails/1.png", *junk)
    assert opened(tmp_path) == {"train": ["ant/1.png", "bee/2.png"]}
    assert folder_splits(tmp_path)["train"].classes == ("ant", "bee")
    said = remarks(tmp_path)
    assert "7 hidden or system files and folders" in said and "@eaDir" in said


def test_a_segmentation_mask_has_the_values_that_were_saved(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(picture(3, 4)).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a_mask.png")
    source = folder_splits(tmp_path)["train"]
    assert isinstance(source, FileSource) and source.masks is not None
    found = source.masks.of(source.name(0))
    assert found is not None
    np.testing.assert_array_equal(np.asarray(Image.open(found)), values)


def test_files_that_an_extra_would_read_name_it(
    write_pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "heif", FORMATS["heif"]._replace(needs=("no_such_module", "torchmae[heif]")))
    write_pictures("a.png", "b.png")
    (tmp_path / "c.heic").write_bytes(b"any")
    assert "1 .heic (pip install 'torchmae[heif]') not used" in remarks(tmp_path)
