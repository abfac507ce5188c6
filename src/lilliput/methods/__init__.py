"""The methods, one idea a file, by the name that is also their recipe key, their test and their page in docs/methods."""

from lilliput.core.registry import Registry

METHODS = Registry(
    "method",
    any_precision="lilliput.methods.quantize.any_precision:AnyPrecision",
    rtn="lilliput.methods.quantize.rtn:RTN",
    wanda="lilliput.methods.prune.wanda:Wanda",
)
