import gzip

import numpy as np
import pytest
import torchvision
from PIL import Image

from vitrify.data import fashion, load_dataset
from vitrify.data.idx import read_idx
from vitrify.errors import InputError, VitrifyError


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def small_debian(tmp_path, monkeypatch):
    """A stand-in for Debian's folder: 20 images per split, two of each class."""
    images = np.arange(20 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(20, 28, 28)
    for name, array in {"images-idx3": images, "labels-idx1": np.arange(20, dtype=np.uint8) % 10}.items():
        for prefix in ("train", "t10k"):
            (tmp_path / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(array)))
    monkeypatch.setattr(fashion, "DEBIAN_ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("split", "count"), [("train", 5000), ("test", 1000), ("val", 1000)])
def test_shipped_subset_is_balanced_and_says_what_it_is(split, count):
    data = load_dataset("fashion-mnist:shipped", split)
    assert len(data) == count
    assert np.bincount(data.labels).tolist() == [count // 10] * 10
    assert f"{count:,} images" in data.source
    assert "subset shipped" in data.source
    assert data.labelled
    assert data.skipped == []
    image, label = data[3]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("L", (28, 28))
    assert np.array_equal(np.asarray(image), data.images[3])
    assert label == data.labels[3]


def test_shipped_subset_is_the_start_of_each_class_of_the_full_set():
    if not fashion.DEBIAN_ROOT.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    full, subset = load_dataset("fashion-mnist:debian", "test"), load_dataset("fashion-mnist:shipped", "test")
    for label in range(10):
        assert np.array_equal(subset.images[subset.labels == label], full.images[full.labels == label][:100])


def test_shipped_data_carry_their_licence_and_stay_small():
    assert "Zalando" in (fashion.SHIPPED_ROOT / "LICENSE").read_text()
    assert sum(path.stat().st_size for path in fashion.SHIPPED_ROOT.iterdir()) < 3e6


@pytest.fixture
def no_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "torchvision_root", lambda: tmp_path / "torch")


def downloaded(root):
    """What torchvision leaves behind: three images per split."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(np.full((3, 28, 28), 7, np.uint8)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([2, 0, 9], np.uint8)))
    return root


@pytest.mark.usefixtures("no_torchvision")
def test_default_source_is_debian_where_installed_else_shipped(small_debian, monkeypatch):
    assert "Debian" in load_dataset("fashion-mnist", "test").source
    monkeypatch.setattr(fashion, "DEBIAN_ROOT", small_debian / "absent")
    assert "shipped" in load_dataset("fashion-mnist", "test").source
    with pytest.raises(InputError, match="apt install dataset-fashion-mnist"):
        load_dataset("fashion-mnist:debian", "test")


@pytest.mark.usefixtures("no_torchvision")
def test_default_source_is_not_an_incomplete_debian(small_debian):
    (small_debian / "train-labels-idx1-ubyte.gz").unlink()
    assert "shipped" in load_dataset("fashion-mnist", "test").source


def test_default_source_is_torchvision_where_debian_is_not(small_debian, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    raw = downloaded(fashion.torchvision_root()) / "FashionMNIST" / "raw"
    assert raw.is_relative_to(tmp_path)
    assert "Debian" in load_dataset("fashion-mnist", "test").source
    monkeypatch.setattr(fashion, "DEBIAN_ROOT", tmp_path / "absent")
    assert "3 images (the full set, from torchvision" in load_dataset("fashion-mnist", "test").source
    (raw / "t10k-images-idx3-ubyte").unlink()
    assert "shipped" in load_dataset("fashion-mnist", "test").source


def test_selecting_keeps_images_with_their_labels():
    data, whole = (load_dataset("fashion-mnist:shipped", "test") for _ in range(2))
    data.select(range(3, 1000, 300))
    assert data.labels.tolist() == whole.labels[3::300].tolist()
    assert np.array_equal(data.images[1], whole.images[303])


def test_idx_round_trip(small_debian):
    data = load_dataset("fashion-mnist:debian", "test")
    assert len(data) == 20
    assert data.images[1, 0, 0] == 28 * 28 % 256
    assert data[13][1] == 3


def test_truncated_gzip_names_the_file(small_debian):
    path = small_debian / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=f"{path.name} cannot be read as gzip"):
        load_dataset("fashion-mnist:debian", "test")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "starts with nothing"),
        (idx_bytes(np.zeros((2, 2), np.uint8)), "starts with 00 00 08 02, not 00 00 08 01"),
        (idx_bytes(np.zeros(5, np.uint8))[:-1], r"declares shape \(5,\), but 4 bytes follow"),
        (idx_bytes(np.zeros(5, np.uint8)) + b"x", r"declares shape \(5,\), but 6 bytes follow"),
        (bytes([0, 0, 8, 1, 0]), "ends after 5 bytes, inside its header of 8"),
    ],
)
def test_foreign_and_inconsistent_idx(tmp_path, content, complaint):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match=complaint):
        read_idx(path, 1)


def test_idx_that_is_not_gzip_or_missing(tmp_path):
    (tmp_path / "plain").write_bytes(b"hello there")
    with pytest.raises(InputError, match="plain cannot be read as gzip"):
        read_idx(tmp_path / "plain", 1)
    with pytest.raises(InputError, match="does not exist"):
        read_idx(tmp_path / "absent.gz", 1)


def test_images_and_labels_that_disagree_are_refused(small_debian):
    labels = np.arange(19, dtype=np.uint8) % 10
    (small_debian / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    with pytest.raises(InputError, match=r"images \(20, 28, 28\), labels \(19,\)"):
        load_dataset("fashion-mnist:debian", "test")


def test_torchvision_reads_what_was_downloaded_before(tmp_path):
    downloaded(tmp_path)
    data = load_dataset(f"fashion-mnist:torchvision={tmp_path}", "test")
    assert "torchvision" in data.source
    assert [data[i][1] for i in range(3)] == [2, 0, 9]
    assert (data.images == 7).all()


def test_torchvision_without_a_network_says_what_to_use_instead(tmp_path, monkeypatch):
    nowhere = (tmp_path / "nowhere").as_uri() + "/"
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [nowhere])
    with pytest.raises(VitrifyError, match=r"could not download.*fashion-mnist:shipped") as caught:
        load_dataset(f"fashion-mnist:torchvision={tmp_path}", "train")
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("fashion-mnst", "fashion-mnist"),
        ("fashion-mnist:debain", "fashion-mnist:debian"),
        ("fashion-mnist:debian=x", ""),
    ],
)
def test_unknown_names_get_the_nearest(spec, hint):
    with pytest.raises(InputError, match=f"unknown data set.*{hint}"):
        load_dataset(spec, "train")


def test_unknown_split():
    with pytest.raises(InputError, match="unknown split of Fashion-MNIST 'tset': did you mean 'test'"):
        load_dataset("fashion-mnist:shipped", "tset")
