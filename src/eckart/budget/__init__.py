"""From candidates per layer and one budget to a plan."""

from eckart.budget.calibrate import calibrated as calibrated
from eckart.budget.calibrate import probe_option as probe_option
from eckart.budget.candidates import BYTES as BYTES
from eckart.budget.candidates import DENSE as DENSE
from eckart.budget.candidates import FLOPS as FLOPS
from eckart.budget.candidates import NUMBERS as NUMBERS
from eckart.budget.candidates import SECONDS as SECONDS
from eckart.budget.candidates import Candidates as Candidates
from eckart.budget.candidates import Measure as Measure
from eckart.budget.candidates import Option as Option
from eckart.budget.candidates import candidates as candidates
from eckart.budget.candidates import least_cost as least_cost
from eckart.budget.knapsack import hull as hull
from eckart.budget.knapsack import knapsack as knapsack
from eckart.budget.knapsack import upgrades as upgrades
from eckart.budget.proportional import proportional as proportional
from eckart.budget.proportional import weights_by_influence as weights_by_influence
from eckart.budget.proportional import weights_by_loss as weights_by_loss
from eckart.budget.threshold import threshold as threshold
from eckart.budget.together import Together as Together
from eckart.budget.together import knapsack_together as knapsack_together
from eckart.budget.together import least_cost_together as least_cost_together
from eckart.budget.uniform import uniform as uniform
from eckart.budget.uniform import uniform_rank as uniform_rank
from eckart.budget.zero_sum import zero_sum as zero_sum
