from tests.system.test_faults import *
from tests.system import test_faults as f
def test_x(house):
    with house.override("virtvmand.socket","[Socket]\nFlushPending=yes\n"), house.override("virtvmand-ro.socket","[Socket]\nFlushPending=yes\n"):
        f.test_wrong_settings(house,"virtvmand")
