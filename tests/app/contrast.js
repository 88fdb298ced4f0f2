// Every visible text whose contrast with what lies behind it is below 4.5 (WCAG 2.1): text, ratio,
// colour, element.
() => {
  const numbers = (text) => (text.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const linear = (value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  };
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const over = (top, below) => {
    const opacity = top[3] === undefined ? 1 : top[3];
    return [0, 1, 2].map((i) => opacity * top[i] + (1 - opacity) * below[i]);
  };
  const behind = (element) => {
    const layers = [];
    // the value of a slider hangs inside its thumb, but is drawn above it
    const outside = element.closest('[data-testid="stSliderThumbValue"]')?.parentElement;
    for (let e = element; e; e = e.parentElement) {
      if (e !== outside) layers.push(numbers(getComputedStyle(e).backgroundColor));
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const ignored =
    'svg, style, script, [data-testid="stIconMaterial"], [disabled], [aria-disabled="true"]';
  const found = [];
  const app = document.querySelector('[data-testid="stApp"]');
  const texts = document.createTreeWalker(app, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    const text = texts.currentNode.textContent.trim();
    const style = getComputedStyle(element);
    if (!text || element.closest(ignored) || style.visibility === "hidden") continue;
    if (!element.getBoundingClientRect().width) continue;
    if (!element.checkVisibility({ opacityProperty: true })) continue;
    const back = behind(element);
    let opacity = 1;
    for (let e = element; e; e = e.parentElement) opacity *= Number(getComputedStyle(e).opacity);
    const [r, g, b, alpha = 1] = numbers(style.color);
    const ink = over([r, g, b, alpha * opacity], back);
    const [low, high] = [luminance(ink), luminance(back)].sort((x, y) => x - y);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) {
      const where = element.outerHTML.slice(0, 200);
      found.push([text.slice(0, 40), ratio.toFixed(2), style.color, where]);
    }
  }
  return found;
}
