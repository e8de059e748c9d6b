"""fxcurv: a graph-rewriting compiler on torch.fx that computes curvature of neural networks."""

from fxcurv.api import Compiled as Compiled
from fxcurv.api import compile as compile
from fxcurv.api import trace as trace
from fxcurv.blockdiagonal import BlockDiagonal as BlockDiagonal
from fxcurv.blocks import Block as Block
from fxcurv.blocks import Dense as Dense
from fxcurv.blocks import Diagonal as Diagonal
from fxcurv.blocks import Eigenbasis as Eigenbasis
from fxcurv.blocks import Kronecker as Kronecker
from fxcurv.checks import Demands as Demands
from fxcurv.checks import Report as Report
from fxcurv.checks import check as check
from fxcurv.errors import CaptureError as CaptureError
from fxcurv.errors import FxcurvError as FxcurvError
from fxcurv.errors import InputError as InputError
from fxcurv.errors import LossError as LossError
from fxcurv.errors import QuantityError as QuantityError
from fxcurv.errors import SpecError as SpecError
from fxcurv.errors import UnsupportedError as UnsupportedError
from fxcurv.estimates import Spectrum as Spectrum
from fxcurv.estimates import estimate_diagonal as estimate_diagonal
from fxcurv.estimates import estimate_trace as estimate_trace
from fxcurv.estimates import spectral_density as spectral_density
from fxcurv.files import load as load
from fxcurv.merging import merge as merge
from fxcurv.operators import LinearOperator as LinearOperator
from fxcurv.products import fisher_operator as fisher_operator
from fxcurv.products import ggn_operator as ggn_operator
from fxcurv.products import hessian_operator as hessian_operator
from fxcurv.products import jacobian_operator as jacobian_operator
from fxcurv.quantities import KFAC as KFAC
from fxcurv.quantities import NAMES as NAMES
from fxcurv.quantities import DiagGGN as DiagGGN
from fxcurv.quantities import Empirical as Empirical
from fxcurv.quantities import Exact as Exact
from fxcurv.quantities import Grad as Grad
from fxcurv.quantities import Rademacher as Rademacher
from fxcurv.quantities import Sampled as Sampled
from fxcurv.quantities import Stratified as Stratified
from fxcurv.result import Curvature as Curvature
from fxcurv.show import tabular as tabular

__version__ = "0.1.0"
