from .dry_run import PrintDryRun as PrintDryRun
from .main import EmptySweepCheck as EmptySweepCheck
from .main import run_command as run_command
