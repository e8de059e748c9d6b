"""Recipes: applications of curvature. Each takes the result of `fxcurv.compile`, with blocks of any class."""

from fxcurv.optim.preconditioned import Preconditioned as Preconditioned
from fxcurv.recipes.averaging import weighted_average as weighted_average
from fxcurv.recipes.influence import influence as influence
from fxcurv.recipes.laplace import Laplace as Laplace
from fxcurv.recipes.penalty import Penalty as Penalty
from fxcurv.recipes.pruning import compensated as compensated
from fxcurv.recipes.pruning import masks as masks
from fxcurv.recipes.pruning import saliencies as saliencies
