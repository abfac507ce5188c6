"""The methods, one idea a file, by the name that is also their recipe key, their test and their page in docs/methods."""

from lilliput.core.registry import Registry

METHODS = Registry(
    "method",
    any_precision="lilliput.methods.quantize.any_precision:AnyPrecision",
    awq="lilliput.methods.quantize.awq:AWQ",
    gptq="lilliput.methods.quantize.gptq:GPTQ",
    hadamard="lilliput.methods.quantize.hadamard:Hadamard",
    leanquant="lilliput.methods.quantize.leanquant:LeanQuant",
    mobilequant="lilliput.methods.quantize.mobilequant:MobileQuant",
    omniquant="lilliput.methods.quantize.omniquant:OmniQuant",
    rtn="lilliput.methods.quantize.rtn:RTN",
    smoothquant="lilliput.methods.quantize.smoothquant:SmoothQuant",
    tune="lilliput.methods.quantize.tune:Tune",
    wanda="lilliput.methods.prune.wanda:Wanda",
)
