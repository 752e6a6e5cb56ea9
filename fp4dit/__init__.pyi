from .api.compare import compare as compare
from .api.comparison import Comparison as Comparison
from .api.expand_weights import expand_weights as expand_weights
from .api.export import export as export
from .api.inspect import inspect as inspect
from .api.methods import methods as methods
from .api.quantization_config import QuantizationConfig as QuantizationConfig
from .api.quantize import quantize as quantize
from .api.report import QuantizationReport as QuantizationReport
from .api.targets import targets as targets

__version__: str
