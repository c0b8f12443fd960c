"""A sub-command: a contact sheet of a prepared dataset, one row of faces for each identity.

toolkit --plugin plugins/examples/contact_sheet.py contact-sheet runs/data/faces sheet.png --faces 8
"""

from pathlib import Path

import numpy as np

from toolkit import Manifest, hookimpl
from toolkit.cli import Parser
from toolkit.data.frames import evenly_spaced, load_frames
from toolkit.files import atomic
from toolkit.pictures import grid, png


def contact_sheet(argv: list[str]) -> int:
    parser = Parser("toolkit contact-sheet", description="A contact sheet of a prepared dataset: one row of faces for each identity.")
    parser.add_argument("manifest", type=Path, help="the dataset's folder, or its manifest.csv")
    parser.add_argument("out", type=Path, help="the picture to write (PNG)")
    parser.add_argument("--faces", type=int, default=8, help="faces in a row (default %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="of a face, in pixels (default %(default)s)")
    args = parser.parse_args(argv)
    frames = load_frames(Manifest.load(args.manifest), args.size)
    images = frames.array()
    rows = []
    for _, places in sorted(frames.table.reset_index(drop=True).groupby("identity").indices.items()):
        rows += [images[places[i]] for i in evenly_spaced(len(places), args.faces)]
        rows += [np.full_like(images[0], 255)] * (args.faces - min(args.faces, len(places)))
    with atomic(args.out) as temporary:
        temporary.write_bytes(png(grid(np.stack(rows), columns=args.faces)))
    print(f"{len(rows) // args.faces} identities in {args.out}")
    return 0


@hookimpl
def toolkit_commands() -> dict:
    return {"contact-sheet": (contact_sheet, "a contact sheet of a prepared dataset")}
