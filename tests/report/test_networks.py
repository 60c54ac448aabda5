import pytest
import torch
from torch import Tensor, nn

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.report.networks import Networks, open_networks


class Detector(nn.Module):
    """Like the Inception file: bytes in, features out."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert return_features
        assert images.dtype == torch.uint8
        return images.flatten(2).float().mean(dim=2)


class Perceptual(nn.Module):
    """Like the LPIPS file: features whose squared distance counts."""

    def forward(
        self, images: Tensor, resize_images: bool = True, return_lpips: bool = False
    ) -> Tensor:
        assert return_lpips
        assert not resize_images
        return images.flatten(1) / 255


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    for name, module in (("inception.pt", Detector()), ("vgg16.pt", Perceptual())):
        torch.jit.script(module).save(str(folder / name))
    return folder


@pytest.fixture(scope="module")
def networks(files):
    return open_networks(files / "inception.pt", files / "vgg16.pt")


def test_inception_is_shown_bytes_of_three_channels(networks):
    pictures = torch.full((40, 1, 8, 8), -1.0)
    pictures[3] = 1
    features = networks.inception_features(pictures)
    assert features.shape == (40, 3)
    assert features[:, 0].tolist() == [0.0] * 3 + [255.0] + [0.0] * 36


def test_lpips_is_the_mean_squared_distance_of_the_pairs(networks):
    first = torch.zeros(2, 3, 8, 8)
    second = first.clone()
    second[1] = 1
    expected = 3 * 64 * 0.5**2 / 2  # one of two pictures is half of the range brighter
    assert networks.perceptual_distance(first, second) == pytest.approx(expected, rel=1e-5)


def test_only_networks_that_were_given_are_named(files):
    assert open_networks().metrics == ()
    assert open_networks(lpips=files / "vgg16.pt").metrics == ("lpips",)
    with pytest.raises(ConfigError, match="--inception PATH is missing"):
        Networks().inception_features(torch.zeros(2, 1, 8, 8))


def test_a_missing_or_foreign_file_is_refused_and_nothing_is_downloaded(tmp_path):
    with pytest.raises(ArtifactError, match="nothing is downloaded"):
        open_networks(tmp_path / "inception.pt")
    (tmp_path / "other.pt").write_bytes(b"no network")
    with pytest.raises(ArtifactError, match=r"--lpips .*other\.pt: no TorchScript"):
        open_networks(lpips=tmp_path / "other.pt")


def test_a_network_of_another_kind_is_refused(files, networks):
    with pytest.raises(ConfigError, match="--inception: the network does not take"):
        open_networks(inception=files / "vgg16.pt").inception_features(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ConfigError, match="1 or 3 channels"):
        networks.inception_features(torch.zeros(2, 4, 8, 8))
