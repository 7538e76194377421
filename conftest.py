"Lets pytest run notebooks: `pytest nbs -k beir`, `pytest nbs --flags 'slow gpu'`"
import pytest


def pytest_addoption(parser):
    parser.addoption('--flags', default='', help='cells with these flags run too, such as "slow net"')


def pytest_collect_file(file_path, parent):
    hidden = any(part[0] in '._' for part in file_path.relative_to(parent.config.rootpath).parts)
    if file_path.suffix == '.ipynb' and not hidden: return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self): yield NotebookItem.from_parent(self, name=self.path.stem)


class NotebookItem(pytest.Item):
    def runtest(self):
        from nbdev.config import get_config
        from nbdev.test import test_nb
        passed, _ = test_nb(self.path, skip_flags=get_config().tst_flags.split(), force_flags=self.config.getoption('--flags').split(), basepath=self.config.rootpath)
        assert passed, f'{self.path.name} fails; its traceback is above'

    def reportinfo(self): return self.path, 0, self.name
