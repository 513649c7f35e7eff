"""What is shown of a result: the clip beside its render, the sheet, the cloud as splats."""

import av
import folder_paths
import pytest
import torch
from worldstereo_fp8.comfy_nodes.show import WorldStereoPreviewClip, write_clip
from worldstereo_fp8.scene.pictures import contact_sheet, side_by_side
from worldstereo_fp8.scene.pointcloud import PointCloud, splat_sizes


def test_the_render_stands_to_the_left_of_its_own_keyframe():
    frames = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 8, 12, 3)
    render = torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 16, 24, 3)
    both = side_by_side(frames, render)
    assert both.shape == (5, 8, 24, 3)
    torch.testing.assert_close(both[:, :, :12], both[:, :, 12:])
    with pytest.raises(ValueError, match="images holds 5 pictures and render_video 4"):
        side_by_side(frames, render[:4])


@pytest.mark.parametrize("count, height, width", [(21, 480, 832), (21, 832, 480), (1, 480, 832), (81, 64, 96)])
def test_a_sheet_shows_every_frame_in_reading_order(count, height, width):
    frames = torch.linspace(0.1, 1, count).view(count, 1, 1, 1).expand(count, height, width, 3)
    sheet = contact_sheet(frames)
    _, sheet_height, sheet_width, _ = sheet.shape
    assert sheet_width <= 1680 and 0.5 <= sheet_width / sheet_height <= 4
    columns = next(n for n in range(1, count + 1) if sheet_width == n * (1680 // n) and fits(n, sheet, frames))
    tile_width, tile_height = sheet_width // columns, sheet_height // -(-count // columns)
    for number in range(count):
        row, column = divmod(number, columns)
        shown = sheet[0, int((row + 0.8) * tile_height), int((column + 0.8) * tile_width)]
        torch.testing.assert_close(shown, frames[number, 0, 0], rtol=0, atol=0.01)


def fits(columns, sheet, frames):
    tile_height = round(1680 // columns * frames.shape[1] / frames.shape[2])
    return -(-len(frames) // columns) * tile_height == sheet.shape[1]


def test_splats_close_the_gap_to_their_neighbours():
    grid = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(5.0), torch.zeros(1), indexing="ij"), -1)
    points = torch.cat([grid.view(-1, 3), torch.tensor([[1000.0, 0, 0]])])
    size = splat_sizes(PointCloud(points, torch.zeros_like(points)))
    assert size[12] == 0.5 and size[-1] == 4  # a hermit is as large as 8 ordinary ones
    assert splat_sizes(PointCloud(points[:1], points[:1])).tolist() == [0]


def test_pictures_with_transparency_become_a_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    sheet, clip = WorldStereoPreviewClip.execute(torch.rand(3, 16, 24, 4)).args
    assert sheet.shape[3] == 3 and clip.get_components().images.shape == (3, 16, 24, 3)
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]


def test_a_large_clip_is_played_small(tmp_path):
    """The encoder keeps dozens of frames, of which the largest have 100 MB each."""
    write_clip(tmp_path / "clip.mp4", torch.rand(2, 2048, 4096, 3), 16)
    with av.open(str(tmp_path / "clip.mp4")) as clip:
        stream = clip.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (2048, 1024, 2)
