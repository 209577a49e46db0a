"""Record the canvas of the final notebook, for readers without a kernel: nbs/images/goals.npz (the grid that the site's page plays with) and nbs/images/drag.gif.

python tools/animate.py

Run from the top of the repository, after notebook 09, whose grid it takes from nbs/checkpoints/remembered. Needs Chromium, chromedriver and selenium.
"""
import pickle
import shutil
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains

from ssm_metarl.widgets import GoalPage, PathGrid

IMAGES, FRAME = Path('nbs/images'), .1  # seconds a picture is shown
GOALS = [(.32, -.28), (-.3, .32), (-.34, -.22), (.2, .4)]  # where the star is dragged to
FLAGS = '--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --window-size=720,640 --hide-scrollbars'


def browser(profile):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium')
    for flag in (*FLAGS.split(), f'--user-data-dir={profile}'): options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(shutil.which('chromedriver')))


def record(driver):
    "Pictures of a hand that drags the star from goal to goal, and looks at a few numbers of steps."
    frames, root = [], driver.find_element('css selector', '.goal-canvas')
    plus = driver.find_elements('css selector', '.goal-canvas button')[2]
    star = driver.find_element('css selector', '.map')
    steps = int(root.get_attribute('data-known'))
    driver.execute_script('window.shown = arguments[0]; arguments[0].set = s => { const i = arguments[0].querySelector("input"); i.value = s; i.oninput(); }', root)
    def shoot(n=1):
        for _ in range(n): frames.append(Image.open(BytesIO(root.screenshot_as_png)).convert('RGB'))
    here, scale = GOALS[-1], star.size['width'] / 1.6
    for goal in GOALS:
        driver.execute_script('shown.set(0)')
        points = [tuple(a + (b - a) * i / 8 for a, b in zip(here, goal)) for i in range(9)]
        x, y = points[0]
        ActionChains(driver, duration=20).move_to_element_with_offset(star, int(x * scale), int(-y * scale)).click_and_hold().perform()
        for x, y in points[1:]:
            ActionChains(driver, duration=20).move_to_element_with_offset(star, int(x * scale), int(-y * scale)).perform()
            shoot()
        ActionChains(driver, duration=20).release().perform()
        for _ in range(min(steps, 4)):
            plus.click()
            shoot(4)
        shoot(6)
        here = goal
    return frames


def main():
    kept = Path('nbs/checkpoints/remembered/grid')
    if not kept.exists(): sys.exit(f'animate.py: {kept} is not there; run notebook 09 at full size first')
    grid = pickle.loads(kept.read_bytes())[1]
    IMAGES.mkdir(exist_ok=True)
    grid.save(IMAGES / 'goals.npz')
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / 'page.html'
        page.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{GoalPage(PathGrid.load(IMAGES / "goals.npz"), GOALS[-1], 0)._repr_html_()}', encoding='utf-8')
        driver = browser(Path(folder) / 'profile')
        try:
            driver.get(page.as_uri())
            time.sleep(1)
            frames = record(driver)
        finally: driver.quit()
    palette = frames[-1].quantize(64, method=Image.Quantize.FASTOCTREE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(IMAGES / 'drag.gif', save_all=True, append_images=frames[1:], duration=int(1000 * FRAME), loop=0, optimize=True)
    for name in ('goals.npz', 'drag.gif'): print(IMAGES / name, f'{(IMAGES / name).stat().st_size / 1000:.0f} kB')


if __name__ == '__main__': main()
