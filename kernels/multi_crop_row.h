// Made by fastdino/ops/multi_crop_row.py; edit that file.
enum {
    BOX = 0, BOX_END = 4,
    FLIP = 4, FLIP_END = 5,
    JITTER = 5, JITTER_END = 13,
    GRAYSCALE = 13, GRAYSCALE_END = 14,
    BLUR = 14, BLUR_END = 15,
    SOLARIZE = 15, SOLARIZE_END = 16,
    FIELDS = 16
};
enum { NONE, BRIGHTNESS, CONTRAST, SATURATION, HUE };
