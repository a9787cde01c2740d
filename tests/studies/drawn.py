"""What a figure shows when it is really drawn: every piece of text, whole and clear of the others."""

from unittest import mock

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg


def text_boxes(fig):
    """(text, box in pixels) of every piece of text that is really drawn; ticks out of view are not."""
    drawn, draw = {}, matplotlib.text.Text.draw

    def record(self, renderer, *args, **kwargs):
        draw(self, renderer, *args, **kwargs)
        if self.get_visible() and self.get_text().strip():
            drawn[id(self)] = (self.get_text(), self.get_window_extent(renderer))

    with mock.patch.object(matplotlib.text.Text, "draw", record):
        FigureCanvasAgg(fig).draw()
    return list(drawn.values())


def assert_text_is_whole_and_apart(fig):
    boxes = text_boxes(fig)
    for i, (text, box) in enumerate(boxes):
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1, f"{text!r} is cut at the side"
        assert fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1, f"{text!r} is cut above or below"
        for other, place in boxes[:i]:
            assert not box.overlaps(place), f"{text!r} lies over {other!r}"
