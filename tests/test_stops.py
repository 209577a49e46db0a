"Ctrl-C and SIGTERM as processes meet them: while the program starts, in pairs, in workers and destructors."
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ssm_metarl.stops import Stopped, Stops, handlers, run_program

ROOT = Path(__file__).resolve().parent.parent
INT, TERM = signal.SIGINT, signal.SIGTERM
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'COLUMNS': '100', 'PYTHONPATH': str(ROOT)}
pytestmark = pytest.mark.skipif(os.name == 'nt', reason='needs POSIX signals')
linux = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads from /proc which signals a process catches')


def start(*command, **options):
    "A process that does not ignore Ctrl-C, whatever we do ourselves."
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(INT, signal.SIG_DFL), **options)


def catches(process, signum):
    "Whether a process has a handler for a signal."
    try: status = Path(f'/proc/{process.pid}/status').read_text()
    except OSError: return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith('SigCgt')), '0')
    return bool(int(caught, 16) >> signum - 1 & 1)


def begun(*command):
    "A process whose first line of ours has run; Python's own start is not ours to guard."
    process = start(*command)
    while process.poll() is None and not (catches(process, TERM) and catches(process, INT)): time.sleep(.002)
    return process


# the program, while it starts, runs and ends

@linux
@pytest.mark.parametrize('name', ['help', 'train'])
def test_a_signal_at_any_moment_ends_the_program_with_a_line(name, tmp_path):
    small = '--outer-steps', 2, '--tasks-per-batch', 2, '--num-envs', 2, '--time-limit', 6, '--ckpt-dir'
    command = dict(help=lambda i: [sys.executable, '-m', 'ssm_metarl', '--help'], train=lambda i: [sys.executable, 'main.py', 'train', *small, tmp_path / str(i)])[name]
    process, begin = begun(*command('whole')), time.monotonic()
    whole = process.communicate()[0]
    duration, said = time.monotonic() - begin, []
    assert process.returncode == 0 and len(whole) > 100
    for i in range(10):
        process, signum = begun(*command(i)), (INT, TERM)[i % 2]
        time.sleep(duration * i / 9)
        process.send_signal(signum)
        out, err = process.communicate()
        complete = out == whole if name == 'help' else out.startswith('{"outer_steps"')
        lines = [line for line in err.splitlines() if line.startswith('ssm-metarl:')]
        where = f'{signum.name} after {i}/9 of {duration:.2f} s: status {process.returncode}, {err!r}'
        assert 'Traceback' not in err and 'Exception ignored' not in err, where
        assert process.returncode == 128 + signum and lines or complete and process.returncode == 0, where
        assert len(lines) <= 1 + (name == 'train') and (name == 'train' or len(err.splitlines()) == len(lines)), where
        said.append(bool(lines))
    assert any(said)


def test_a_library_leaves_the_handlers_alone():
    script = 'import signal, ssm_metarl.pipeline; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)'
    assert start(sys.executable, '-c', script).communicate()[0].split() == ['True', 'True']


def program(folder, text):
    "A script with the program's name."
    path = folder / 'ssm-metarl'
    path.write_text('import os, signal, sys, time\nfrom ssm_metarl.stops import *\n' + text)
    return sys.executable, path


def test_a_workers_process_is_not_the_program(tmp_path):
    words = program(tmp_path, 'import multiprocessing\nif __name__ == "__main__":\n    print(is_program())\n    worker = multiprocessing.get_context("spawn").Pool(1)\n    print(worker.apply(is_program))\n    worker.terminate()\n')
    assert start(*words).communicate()[0].split() == ['True', 'False']


def test_the_second_signal_ends_the_program_at_once(tmp_path):
    text = 'def main():\n    try: os.kill(os.getpid(), signal.SIGTERM)\n    finally: os.kill(os.getpid(), signal.SIGINT); print("not reached", flush=True)\nsys.exit(run_program(main))'
    process = start(*program(tmp_path, text))
    assert process.communicate() == ('', 'ssm-metarl: stopped by SIGINT\n') and process.returncode == 130


def test_a_signal_in_a_destructor_ends_the_program_too(tmp_path):
    text = 'class Trap:\n    def __del__(self): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0)\ndef main(): Trap(); print("not reached", flush=True)\nsys.exit(run_program(main))'
    process = start(*program(tmp_path, text))
    assert process.communicate() == ('', 'ssm-metarl: stopped by SIGTERM\n') and process.returncode == 143


def test_what_was_ignored_stays_ignored(tmp_path):
    text = 'def main():\n    os.kill(os.getpid(), signal.SIGINT)\n    with Stops(): os.kill(os.getpid(), signal.SIGINT)\n    print("done")\n    return 0\nsys.exit(run_program(main))'
    python, path = program(tmp_path, text)
    process = start('sh', '-c', f'trap "" INT; exec {python} {path}')
    assert process.communicate() == ('done\n', '') and process.returncode == 0


def test_a_closed_stderr_does_not_end_in_another_file(tmp_path):
    text = 'file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\nwith Stops(): os.kill(os.getpid(), signal.SIGTERM); print(file)'
    python, path = program(tmp_path, text)
    process = start('sh', '-c', f'exec {python} {path} {tmp_path / "data"} 2>&-')
    assert process.communicate()[0] == '2\n' and (tmp_path / 'data').read_bytes() == b''


def test_help_is_whole_when_a_signal_follows(tmp_path):
    text = 'run_program(lambda: print("help"))\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)'
    process = start(*program(tmp_path, text))
    assert process.communicate() == ('help\n', 'ssm-metarl: stopped by SIGTERM\n') and process.returncode == 143


# a loop with commits

LOOP = '''
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location('stops', sys.argv[1])
stops_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stops_module)
path, folder, sys.argv = *sys.argv[1:], ['ssm-metarl']
stops_module.begin_program()

def wait(ms):
    end = time.perf_counter() + ms / 1e3
    while time.perf_counter() < end: pass

def write(name, value):
    with open(name + '.new', 'w') as file: file.write(str(value))
    wait(2)
    os.replace(name + '.new', name)

def commit(whole):
    for name, value in whole.items(): write(os.path.join(folder, name), value)

def main():
    state = dict(a=0, b=0)
    whole = dict(state)
    commit(whole)
    with stops_module.Stops() as stops:
        print('ready', flush=True)
        try:
            while not stops.wanted:
                for name in state:
                    state[name] += 1
                    wait(4)
                whole = dict(state)
                with stops.shielded(): commit(whole)
        finally:
            with stops.shielded():
                for name in state:
                    state[name] = whole[name]
                    wait(4)
                commit(state)

sys.exit(stops_module.run_program(main))
'''


def test_pairs_of_signals_never_split_a_commit(tmp_path):
    (tmp_path / 'loop.py').write_text(LOOP)
    announced = 0
    for gap in range(16):
        folder, first, second = tmp_path / str(gap), (INT, TERM)[gap // 2 % 2], (INT, TERM)[gap % 2]
        folder.mkdir()
        process = start(sys.executable, tmp_path / 'loop.py', ROOT / 'ssm_metarl' / 'stops.py', folder)
        assert process.stdout.readline() == 'ready\n'
        time.sleep(.01 + .0013 * gap)
        for signum in (first, second, second):  # the third has to do nothing
            process.send_signal(signum)
            time.sleep(gap / 1e3)
        err = process.communicate()[1]
        a, b = ((folder / name).read_text() for name in 'ab')
        assert a == b and sorted(os.listdir(folder)) == ['a', 'b'], (gap, a, b)
        assert process.returncode in (128 + first, 128 + second), (gap, process.returncode)  # of two that wait, Python takes the lower number first
        assert 'Traceback' not in err and len(err.splitlines()) <= 3, err
        announced += err.count('finishing this step')
    assert announced > 8


# in this process

def test_without_a_signal_nothing_happens(capfd):
    before = handlers()
    with Stops() as stops:
        with stops.shielded(): pass
    assert (stops.wanted, stops.status, handlers(), capfd.readouterr().err) == (None, None, before, '') and before


def test_an_error_in_a_commit_passes_and_handlers_come_back():
    before, hook = handlers(), sys.unraisablehook
    with pytest.raises(OSError, match='disk full'), Stops(None) as stops, stops.shielded():
        for _ in range(2): signal.raise_signal(INT)
        raise OSError('disk full')
    assert handlers() == before and sys.unraisablehook is hook and stops.status == 130


def test_the_clean_up_is_not_interrupted():
    cleaned = []
    with pytest.raises(Stopped) as info, Stops(None) as stops:
        try:
            signal.raise_signal(TERM)
            signal.raise_signal(INT)
            raise AssertionError('the second signal did not drop the step')
        finally:
            for _ in range(3): signal.raise_signal(INT)
            cleaned.append(True)
    assert cleaned and info.value.status == 143 and str(info.value) == 'stopped by SIGTERM' and stops.signals == [TERM, INT, INT, INT, INT]


def test_nested_shields_hold_to_the_last():
    reached = []
    with pytest.raises(Stopped), Stops(None) as stops:
        with stops.shielded():
            with stops.shielded():
                for _ in range(2): signal.raise_signal(INT)
            reached.append('inner')
        reached.append('outer')
    assert reached == ['inner']


def test_the_inner_of_two_takes_the_signal():
    before = handlers()
    with pytest.raises(Stopped), Stops(None) as outer:
        with Stops(None) as inner: signal.raise_signal(INT)
    assert (inner.wanted, outer.wanted, handlers()) == (INT, None, before)


class Trap:
    "Its destructor is struck by a signal."
    def __del__(self): signal.raise_signal(TERM)


def test_a_signal_that_a_destructor_swallows_is_not_the_last(capfd):
    with pytest.raises(Stopped), Stops(None) as stops:
        signal.raise_signal(TERM)
        Trap()
        assert stops.signals == [TERM, TERM]
        signal.raise_signal(TERM)
        raise AssertionError('the third signal did not leave')
    assert capfd.readouterr().err == ''


def test_other_errors_in_destructors_are_reported_as_ever(monkeypatch):
    class Broken:
        def __del__(self): raise ZeroDivisionError
    heard = []
    monkeypatch.setattr(sys, 'unraisablehook', lambda unraisable: heard.append(unraisable.exc_type))
    with Stops(None): Broken()
    run_program(lambda: Broken() and 0)
    assert heard == [ZeroDivisionError] * 2


def test_in_a_thread_it_does_nothing():
    before, found = handlers(), []
    def work():
        with Stops(None) as stops, stops.shielded(): found.append((handlers(), stops.wanted))
        found.append(run_program(lambda: 3))
    thread = threading.Thread(target=work)
    thread.start(), thread.join()
    assert found == [({}, None), 3] and handlers() == before


@linux
def test_a_forked_worker_outlives_ctrl_c_and_ends_at_sigterm():
    with Stops(None):
        worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        worker.start()
        os.kill(worker.pid, INT)
        worker.join(.3)
        assert worker.is_alive()
        worker.terminate()
        worker.join(30)
    assert worker.exitcode == 143


@pytest.mark.parametrize('signum', [INT, TERM])
def test_a_command_that_turns_the_stop_into_an_error_still_has_its_status(signum, capfd):
    def stubborn():
        try: signal.raise_signal(signum)
        except KeyboardInterrupt: return 1
    def deaf():
        try: signal.raise_signal(signum)
        except KeyboardInterrupt: return 0
    assert [run_program(main) for main in (stubborn, deaf)] == [128 + signum, 0] and capfd.readouterr().err == ''
    assert run_program(lambda: signal.raise_signal(signum)) == 128 + signum and capfd.readouterr().err == f'ssm-metarl: stopped by {signum.name}\n'
