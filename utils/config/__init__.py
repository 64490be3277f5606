"""Settings: `settings` (layers, loading), `schema` (the shared sections), `convert` (types and ranges)."""

from utils.config.convert import Count, Ends, Fraction, Interval, Range, Rate, Weight, check_interval, convert
from utils.config.schema import Degradations, Haze, OutdoorDepth, Settings, Sometimes, Test, Train, WarmStart, Warp
from utils.config.settings import DEFAULTS, Override, check_used, dump, given, load, read_yaml, section, to_dict
