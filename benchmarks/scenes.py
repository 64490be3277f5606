"""A rendered street: images with known depth for scenes that the sample set lacks (night, white walls, wide sky)."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HEIGHT, WIDTH = 300, 450  # pixels
RAYS = 2  # per pixel, along each side
EYE = 1.7  # height of the camera in metres
HORIZON = 0.46  # share of the image height
FOCUS = 0.85  # focal length as a share of the image width
LAMPS = ((-3.6, 9), (3.6, 16), (-3.6, 26), (3.6, 40))  # x, z in metres
LAMP_HEIGHT = 5.0

Colour = tuple[float, float, float]
BRICK, OCHRE, GREY, WHITE = (0.55, 0.27, 0.2), (0.78, 0.62, 0.36), (0.5, 0.5, 0.52), (0.93, 0.93, 0.92)
RED, BLUE, PANE, TRUNK = (0.7, 0.08, 0.08), (0.12, 0.2, 0.55), (0.12, 0.14, 0.18), (0.25, 0.17, 0.1)


class Box(NamedTuple):
    low: tuple[float, float, float]  # x to the right, y upwards, z away, in metres
    high: tuple[float, float, float]
    colour: Colour
    windows: bool = False


def street(walls: tuple[Colour, ...] = (BRICK, OCHRE, GREY), cars: tuple[Colour, ...] = (RED, BLUE)) -> list[Box]:
    """Houses on both sides, with ``walls`` in turn, two cars, lamp posts and tree trunks."""
    boxes = []
    for n, (near, far, height) in enumerate([(7, 14, 6), (16, 22, 8.5), (25, 34, 5.5), (37, 46, 9), (50, 62, 7)]):
        boxes.append(Box((-13, 0, near), (-5.2, height, far), walls[n % len(walls)], True))
        boxes.append(Box((5.2, 0, near + 2), (13, height * 0.9, far + 2), walls[(n + 1) % len(walls)], True))
    for colour, (x, z) in zip(cars, [(0.9, 8.5), (-2.4, 17)], strict=True):
        boxes.append(Box((x, 0.3, z), (x + 1.7, 0.9, z + 3.8), colour))
        boxes.append(Box((x, 0.9, z + 0.9), (x + 1.7, 1.4, z + 3), PANE))
    boxes += [Box((x - 0.07, 0, z - 0.07), (x + 0.07, LAMP_HEIGHT, z + 0.07), GREY) for x, z in LAMPS]
    return [*boxes, Box((-4.7, 0, 12), (-4.4, 2.2, 12.3), TRUNK), Box((4.4, 0, 23), (4.7, 2.2, 23.3), TRUNK)]


def render(boxes: list[Box], height: int = HEIGHT, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """The scene by day: -> (3,H,W) in [0,1], and distances in metres (1,H,W), infinite in the sky."""
    rays = _rays(height * RAYS, width * RAYS)
    colours = _sky(rays)
    distance = np.full(rays.shape[:2], np.inf)
    z = np.where(rays[..., 1] < 0, -EYE / np.minimum(rays[..., 1], -1e-9), np.inf)
    seen = z < 400
    colours[seen] = _ground((rays * z[..., None])[seen])
    distance[seen] = z[seen]
    for box in boxes:
        _draw(box, rays, colours, distance)
    for x, y, far, radius in ((-4.5, 3.3, 12.1, 1.6), (4.5, 3.4, 23.1, 1.8)):
        _crown(np.array([x, y - EYE, far]), radius, rays, colours, distance)
    clear = torch.from_numpy(colours).permute(2, 0, 1).float()
    metres = torch.from_numpy(distance * np.linalg.norm(rays, axis=2))[None].float()
    # The nearest distance of a pixel, since a mean of wall and sky has no meaning.
    return F.avg_pool2d(clear[None], RAYS)[0].clamp(0, 1), -F.max_pool2d(-metres[None], RAYS)[0]


def by_night(clear: Tensor, metres: Tensor, seen: float) -> tuple[Tensor, Tensor]:
    """A scene of `render` lit by its lamps, without fog and with fog of a visibility of ``seen`` metres.

    Fog at night glows around lamps and is dark elsewhere, so no single airlight describes it.
    """
    height, width = clear.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    warm = torch.tensor([1.0, 0.75, 0.4]).view(3, 1, 1)
    light = torch.zeros(1, height, width)
    glow = torch.zeros(1, height, width)
    lamps = torch.zeros(1, height, width)
    for x, z in LAMPS:
        column = width / 2 + FOCUS * width * x / z
        row = HORIZON * height - FOCUS * width * (LAMP_HEIGHT - EYE) / z
        offset = torch.hypot(rows - row, columns - column) * z / (FOCUS * width)  # from the lamp, in metres
        light += 1.3 * torch.exp(-offset / 3)
        glow += 0.9 * torch.exp(-z / torch.tensor(seen)) * torch.exp(-offset / 1.2)
        lamps += (offset < 0.22).float()
    dark = clear * (torch.tensor([0.05, 0.06, 0.09]).view(3, 1, 1) + warm * light * metres.isfinite())
    t = torch.exp(-3 * metres.clamp(max=300) / seen)
    shine = (warm * lamps * 1.5).clamp(0, 1)
    foggy = dark * t + torch.tensor([0.09, 0.1, 0.12]).view(3, 1, 1) * (1 - t) + warm * glow
    return torch.maximum(dark, shine).clamp(0, 1), torch.maximum(foggy, shine).clamp(0, 1)


def _rays(height: int, width: int) -> np.ndarray:
    """The direction (H,W,3) in which every pixel looks from the camera, with z = 1."""
    columns = (np.arange(width) + 0.5 - width / 2) / (FOCUS * width)
    rows = (HORIZON * height - np.arange(height) - 0.5) / (FOCUS * width)
    return np.stack([*np.meshgrid(columns, rows), np.ones((height, width))], 2)


def _sky(rays: np.ndarray) -> np.ndarray:
    height = np.clip(rays[..., 1:2] / 0.5, 0, 1)
    blue = (1 - height) * np.array([0.75, 0.83, 0.92]) + height * np.array([0.28, 0.48, 0.82])
    coarse = torch.from_numpy(np.random.default_rng(3).random((1, 1, 5, 9)))
    clouds = F.interpolate(coarse, rays.shape[:2], mode="bicubic", align_corners=True)[0, 0, ..., None].numpy()
    return blue + (0.97 - blue) * np.clip(2 * clouds - 1, 0, 1)


def _ground(points: np.ndarray) -> np.ndarray:
    """The colours of road with lane marks, pavement and grass at ``points`` (N,3): (N,3)."""
    x = np.abs(points[..., 0:1])
    z = points[..., 2:]
    grain = 0.85 + 0.3 * _speckle(np.floor(6 * points[..., 0:1]), np.floor(6 * z))
    colour = np.where(x < 5.2, np.array([0.56, 0.54, 0.5]), np.array([0.25, 0.4, 0.14])) * grain
    colour = np.where(x < 3.3, np.array([0.3, 0.3, 0.31]) * (0.5 + 0.5 * grain), colour)
    return np.where((x < 0.09) & (z % 6 < 3), np.array([0.85, 0.85, 0.82]), colour)


def _draw(box: Box, rays: np.ndarray, colours: np.ndarray, distance: np.ndarray) -> None:
    """Draw a box over everything behind it; the sun is behind the camera."""
    low = np.array(box.low) - [0, EYE, 0]
    high = np.array(box.high) - [0, EYE, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.sort(np.stack([low / rays, high / rays]), axis=0)
    entry, side = ends[0].max(2), ends[0].argmax(2)
    seen = (entry < ends[1].min(2)) & (entry > 0) & (entry < distance)
    points = rays[seen] * entry[seen][:, None]
    side = side[seen]
    shaded = np.array(box.colour) * np.array([0.72, 0.5, 1.0])[side][:, None]
    if box.windows:
        along = np.where(side == 0, points[:, 2], points[:, 0])
        pane = (side != 1) & (along % 2.2 > 0.8) & (along % 2.2 < 1.8) & ((points[:, 1] + EYE) % 2.8 > 1.1)
        shaded[pane] = PANE
    colours[seen] = shaded
    distance[seen] = entry[seen]


def _crown(centre: np.ndarray, radius: float, rays: np.ndarray, colours: np.ndarray, distance: np.ndarray) -> None:
    """Draw the crown of a tree, a sphere of leaves."""
    square = (rays**2).sum(2)
    along = rays @ centre
    inner = along**2 - square * (centre @ centre - radius**2)
    z = (along - np.sqrt(np.maximum(inner, 0))) / square
    seen = (inner > 0) & (z < distance)
    points = rays[seen] * z[seen][:, None]
    leaves = 0.5 + 0.8 * _speckle(*np.floor(9 * points[:, :2]).T)
    shade = 0.6 + 0.4 * (points[:, 1] - centre[1]) / radius
    colours[seen] = np.array([0.16, 0.33, 0.1]) * (leaves * shade)[:, None]
    distance[seen] = z[seen]


def _speckle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pseudo-random numbers in [0,1), a function of ``a`` and ``b``."""
    return np.modf(np.abs(np.sin(12.9898 * a + 78.233 * b)) * 43758.5453)[0]
