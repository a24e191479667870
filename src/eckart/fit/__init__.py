"""Fitting: from a matrix and a metric to the nearest map of a family, with its error."""

from eckart.fit.coded import coded as coded
from eckart.fit.coded import coded_blank as coded_blank
from eckart.fit.coded import coded_shared as coded_shared
from eckart.fit.error import best_bias as best_bias
from eckart.fit.error import error_of as error_of
from eckart.fit.metric import Metric as Metric
from eckart.fit.metric import metric as metric
from eckart.fit.quantize import Coding as Coding
from eckart.fit.regression import Fit as Fit
from eckart.fit.regression import Regression as Regression
from eckart.fit.regression import regress as regress
