"""``toolkit data``: prepare, puppets, audit."""

from __future__ import annotations

from toolkit.cli import Parser
from toolkit.data import prepare, puppets


def main(argv: list[str]) -> int:
    """Entry point of ``toolkit data``."""
    from toolkit.data import audit

    parser = Parser("toolkit data", description="Make a dataset (frames and a manifest), and look for shortcuts in it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = commands.add_parser(
        "prepare",
        help="sample frames from videos, crop the face, split by identity",
        description="Sample frames from videos, crop the face, split by identity, and write manifest.csv. "
        "Running it again continues where it stopped.",
        epilog="Exit status: 0 all videos were used, 3 some could not be (each is listed with the reason), 2 nothing could be done.",
    )
    prepare.add_arguments(sub)
    sub.set_defaults(run=prepare.run)
    sub = commands.add_parser(
        "puppets",
        help="render the embedded data set of procedural talking faces",
        description="Render procedural talking faces with known identity, pose, mouth, blink and lighting. No download.",
    )
    puppets.add_arguments(sub)
    sub.set_defaults(run=puppets.run)
    sub = commands.add_parser(
        "audit",
        help="look for what tells real from fake without a look at the face",
        description="Report what could give a detector the answer without looking at the face: format, JPEG quality, resolution, "
        "traces of cropping and resizing, codec, frame counts; people, videos, sources and near-duplicate frames on both sides of a "
        "split. Trains a classifier that sees metadata only, and says how far above chance it is.",
        epilog="Exit status: 0 no shortcut was found, 1 there is one, 2 the data cannot be read.",
    )
    audit.add_arguments(sub)
    sub.set_defaults(run=audit.run)
    args = parser.parse_args(argv)
    return int(args.run(args))
