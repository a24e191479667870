"""Numerics on plain tensors: eigen-decompositions, truncated SVDs and pivot rows; knows no maps and no networks."""

from eckart.linalg.eigen import TopEigen as TopEigen
from eckart.linalg.eigen import psd_roots as psd_roots
from eckart.linalg.eigen import regular_cholesky as regular_cholesky
from eckart.linalg.eigen import shrink as shrink
from eckart.linalg.eigen import top_eigen as top_eigen
from eckart.linalg.filtered import filtered_svd as filtered_svd
from eckart.linalg.finite import all_finite as all_finite
from eckart.linalg.lanczos import largest_eigenvalue as largest_eigenvalue
from eckart.linalg.matching_pursuit import orthogonal_matching_pursuit as orthogonal_matching_pursuit
from eckart.linalg.pivots import Pivots as Pivots
from eckart.linalg.pivots import pivot_rows as pivot_rows
from eckart.linalg.polar import polar_factor as polar_factor
from eckart.linalg.recombine import svd_of_product as svd_of_product
from eckart.linalg.rescaled import factored_row_norms as factored_row_norms
from eckart.linalg.rescaled import rescaled_gradients as rescaled_gradients
from eckart.linalg.rescaled import rescaled_sum as rescaled_sum
from eckart.linalg.scores import score_errors as score_errors
from eckart.linalg.stacked import Sketch as Sketch
from eckart.linalg.stacked import growth_bound as growth_bound
from eckart.linalg.stacked import lower_bound as lower_bound
from eckart.linalg.stacked import residual_bound as residual_bound
from eckart.linalg.stacked import sketch as sketch
from eckart.linalg.stacked import stacked as stacked
from eckart.linalg.stacked import union_bound as union_bound
from eckart.linalg.svd import TruncatedSVD as TruncatedSVD
from eckart.linalg.svd import truncated_svd as truncated_svd
