"""Open the pages of the site in a browser, as wide as a phone and as a desk, and name what is wider than the page or cut off.

    python tools/browse.py                       # the pages of tools/preview.py, in _preview
    python tools/browse.py _docs                 # those that Quarto built
    python tools/browse.py --shots FOLDER index  # also pictures of some pages, in light and dark

Needs selenium, Chromium (or Chrome) and its driver: on Debian `apt-get install chromium chromium-driver`. Says so, and checks nothing, where they are missing."""
import argparse
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

WIDTHS = {'phone': 390, 'desk': 1200}
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--hide-scrollbars')
MEASURE = '''
const seen = [], width = document.documentElement.clientWidth, say = (what, e) => seen.push(what + ' <' + e.tagName.toLowerCase() + '> ' + (e.textContent || '').trim().replace(/\\s+/g, ' ').slice(0, 60));
document.querySelectorAll('details').forEach(e => e.open = true);
const full = document.documentElement.scrollWidth;
if (full > width + 1) seen.push('the page is ' + full + ' px wide');
const flow = e => getComputedStyle(e).overflowX;
const scrolls = e => e && e !== document.body && e.tagName !== 'HTML' && (['auto', 'scroll'].includes(flow(e)) || scrolls(e.parentElement));
for (const e of document.querySelectorAll('main *')) {
  const box = e.getBoundingClientRect();
  if (!box.width || e.closest('mjx-container > *, svg, button, .anchorjs-link, .visually-hidden, .screen-reader-only')) continue;
  if (['hidden', 'clip'].includes(flow(e)) && e.scrollWidth > e.clientWidth + 1 && e.clientWidth) say('cut off:', e);
  if (box.right > width + 1 && !scrolls(e.parentElement) && !(scrolls(e) && box.left >= 0 && box.width <= width)) say('sticks out:', e);
}
document.querySelectorAll('main img').forEach(e => { if (e.complete && !e.naturalWidth && !e.src.startsWith('http')) seen.push('no picture at ' + e.getAttribute('src').slice(0, 80)); });
return seen;
'''


def browser_missing():
    "What is not installed; empty if a browser can be had."
    try: import selenium  # noqa: F401
    except ImportError: return 'selenium'
    if not browser_path(): return 'Chromium'
    return '' if shutil.which('chromedriver') else 'chromedriver'


def browser_path(): return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@contextmanager
def browser():
    "A browser without a window, with a fresh profile."
    from selenium import webdriver
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser_path()
        for flag in (*FLAGS, f'--user-data-dir={profile}'): options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which('chromedriver')))
        try: yield driver
        finally: driver.quit()


def resize(driver, width, height=844):
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': False})


def faults(driver, page):
    "What is wrong with a page, one line each."
    driver.get(page.resolve().as_uri())
    for device, width in WIDTHS.items():
        resize(driver, width)
        yield from (f'{page.name} at {width} px ({device}): {fault}' for fault in driver.execute_script(MEASURE))


def shots(driver, page, anchor, folder):
    "Pictures of the top of a page, or of what an anchor names: light and dark, phone and desk."
    for device, width in WIDTHS.items():
        for theme in ('light', 'dark'):
            driver.get('about:blank')  # an address that differs in its anchor alone would not be loaded anew
            resize(driver, width, 1600)
            driver.get(f'{page.resolve().as_uri()}{"?dark" if theme == "dark" else ""}{"#" * bool(anchor)}{anchor}')
            (folder / f'{page.stem}{anchor}-{device}-{theme}.png').write_bytes(driver.get_screenshot_as_png())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=Path, default=Path('_preview'))
    parser.add_argument('--must', action='store_true', help='exit with status 1 where there is no browser')
    parser.add_argument('--shots', nargs='+', metavar=('FOLDER', 'PAGE'), help='a folder for pictures, and names of pages without .html, each with or without an #anchor')
    args = parser.parse_args()
    if missing := browser_missing():
        print(f'browse.py: no page was looked at, {missing} is not installed here')
        return args.must
    pages = sorted(args.folder.glob('*.html'))
    if not pages: sys.exit(f'browse.py: no page in {args.folder}; run python tools/preview.py first')
    with browser() as driver:
        if args.shots:
            Path(args.shots[0]).mkdir(parents=True, exist_ok=True)
            for name in args.shots[1:]:
                name, _, anchor = name.partition('#')
                shots(driver, args.folder / f'{name}.html', anchor, Path(args.shots[0]))
            return None
        found = [fault for page in pages for fault in faults(driver, page)]
    print('\n'.join([*found, f'{len(pages)} pages at {" and ".join(map(str, WIDTHS.values()))} px: {len(found)} faults']))
    return bool(found)


if __name__ == '__main__': sys.exit(main())
