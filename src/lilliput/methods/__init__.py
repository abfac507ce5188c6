"""The methods, one idea a file, by the name that is also their recipe key, their test and their page in docs/methods."""

from lilliput.core.registry import Registry

METHODS = Registry(
    "method",
    gptq="lilliput.methods.quantize.gptq:GPTQ",
    leanquant="lilliput.methods.quantize.leanquant:LeanQuant",
    rtn="lilliput.methods.quantize.rtn:RTN",
    tune="lilliput.methods.quantize.tune:Tune",
    wanda="lilliput.methods.prune.wanda:Wanda",
)
