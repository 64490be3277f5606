import torch

from utils.evaluation import selection


def test_a_ground_truth_is_identified_by_its_content():
    """As RESIDE ships it and without its border; larger than the middle, and smaller."""
    for height, width in ((480, 640), (40, 50)):
        clear = torch.randint(0, 256, (3, height, width)) / 255
        assert selection.fingerprint(clear) == selection.fingerprint(clear + 0.001)
        other = clear.clone()
        other[:, height // 2, width // 2] = 1 - other[:, height // 2, width // 2]
        assert selection.fingerprint(other) != selection.fingerprint(clear)
    official = torch.rand(3, 480, 640)
    assert selection.fingerprint(official[:, 10:-10, 10:-10]) == selection.fingerprint(official)


def test_remarks_about_figures_on_images_used_for_selection():
    chosen = selection.chosen_on(["mine"], 3, ["a", "b", "b"])
    assert chosen == {"sets": ["mine"], "pictures": 3, "truths": ["a", "b"]}
    assert selection.warning(chosen, ["c", "d"]) is None
    assert "ground truths of 2 of these 3 images (validation on mine)" in selection.warning(chosen, ["a", "a", "c"])
