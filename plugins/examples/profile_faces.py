"""A face detector for people who look aside: OpenCV's cascade for profiles, of both sides, after the frontal one.

toolkit --plugin plugins/examples/profile_faces.py data prepare VIDEOS OUT --faces profile
"""

from pathlib import Path

import cv2
import numpy as np

from toolkit import Face, hookimpl
from toolkit.data.faces import Haar


class Profile:
    """Frontal faces where there are any, otherwise faces in profile (Viola & Jones 2001, both cascades inside OpenCV)."""

    def __init__(self, model: Path | None = None) -> None:
        self.frontal = Haar()
        self.profile = cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / "haarcascade_profileface.xml"))

    def __call__(self, frame: np.ndarray) -> list[Face]:
        """Faces of an ``(H, W, 3)`` uint8 BGR frame, best first."""
        if faces := self.frontal(frame):
            return faces
        grey = cv2.equalizeHist(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY))
        width = frame.shape[1]
        least = max(24, min(grey.shape) // 10)
        # The cascade knows faces that look to one side; in the mirror it sees the others.
        for mirrored in (False, True):
            image = cv2.flip(grey, 1) if mirrored else grey
            for x, y, w, h in self.profile.detectMultiScale(image, 1.1, 5, minSize=(least, least)):
                faces.append(Face(float(width - x - w if mirrored else x), float(y), float(w), float(h), 0.5))
        return sorted(faces, key=lambda face: -face.width * face.height)


@hookimpl
def toolkit_face_detectors() -> dict:
    return {"profile": Profile}
