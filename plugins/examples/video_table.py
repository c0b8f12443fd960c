"""A dataset layout: any dataset that one table describes.

SOURCE/videos.csv has a line for each video, with the columns ``path`` (from SOURCE), ``identity`` and ``label`` (real or fake), and
where they are known ``method``, ``source`` (the original of a fake) and ``split``.

toolkit --plugin plugins/examples/video_table.py data prepare SOURCE OUT --layout table
"""

from pathlib import Path

import pandas as pd

from toolkit import Listing, UserError, VideoItem, hookimpl


def table(source: Path) -> Listing:
    """The videos that ``videos.csv`` lists, and a remark for every one that is not there."""
    try:
        rows = pd.read_csv(source / "videos.csv", dtype=str).fillna("")
    except (OSError, ValueError) as error:
        raise UserError(f"{source / 'videos.csv'} cannot be read: {error}") from error
    if missing := {"path", "identity", "label"} - set(rows.columns):
        raise UserError(f"{source / 'videos.csv'} lacks the column(s) {', '.join(sorted(missing))}")
    listing = Listing([])
    for row in rows.to_dict("records"):
        path = source / row["path"]
        if not path.exists():
            listing.remarks.append(f"{row['path']} is not there")
            continue
        name = Path(row["path"]).with_suffix("").as_posix()
        method = row.get("method") or row["label"]
        item = VideoItem(path, name, row["identity"], row["label"], method, row.get("source") or name, row.get("split") or "")
        listing.items.append(item)
    return listing


@hookimpl
def toolkit_dataset_layouts() -> dict:
    return {"table": table}
