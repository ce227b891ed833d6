"""The row of numbers that tells the kernels of `multi_crop` how to make a view.

`fastdino.data.crops.encode` writes rows, the kernels in C++ and Triton read them; all take the layout from
here. After an edit, run

    python fastdino/ops/multi_crop_row.py > kernels/multi_crop_row.h

and build the library again.
"""

# A field of crops.View and how many numbers it takes, in the order of the row.
ROW = {
    "box": 4,  # top, left, height, width in pixels of the image
    "flip": 1,  # 0 or 1
    "jitter": 8,  # four pairs of an adjustment's number and its factor, in the order of application
    "grayscale": 1,  # 0 or 1
    "blur": 1,  # Pillow's radius, negative for none
    "solarize": 1,  # 0 or 1
}
ADJUSTMENTS = ("brightness", "contrast", "saturation", "hue")  # their numbers are 1, 2, ...; 0 is none

FIELDS = sum(ROW.values())
_ENDS = [sum(list(ROW.values())[: i + 1]) for i in range(len(ROW))]
# the numbers of a field: row[AT["box"]]
AT = {name: slice(end - ROW[name], end) for name, end in zip(ROW, _ENDS, strict=True)}


def number_of(adjustment: str) -> int:
    """The number that stands for one of ADJUSTMENTS."""
    return 1 + ADJUSTMENTS.index(adjustment)


def header() -> str:
    """The same layout for C++: where each field begins and ends, and the numbers of the adjustments."""
    fields = [
        f"    {name.upper()} = {at.start}, {name.upper()}_END = {at.stop},\n" for name, at in AT.items()
    ]
    return (
        "// Made by fastdino/ops/multi_crop_row.py; edit that file.\n"
        f"enum {{\n{''.join(fields)}    FIELDS = {FIELDS}\n}};\n"
        f"enum {{ NONE, {', '.join(ADJUSTMENTS).upper()} }};\n"
    )


if __name__ == "__main__":
    print(header(), end="")
