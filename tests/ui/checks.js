// What the tests look for in the page: evaluated there as `(CHECKS).name(...)`.
({
  /** Visible controls lower than `least` pixels. */
  small(least) {
    return [...document.querySelectorAll('button, [role=button], a.sy-remote-image, textarea')]
      .filter((node) => node.checkVisibility({ visibilityProperty: true, opacityProperty: true }))
      .filter((node) => !node.closest('#sy-params, #sy-modelbar'))
      .map((node) => [node.getAttribute('aria-label') || node.textContent, node.getBoundingClientRect()])
      .filter(([, box]) => box.width && box.height && box.height < least && box.top < innerHeight && box.bottom > 0)
      .map(([name, box]) => `${name} ${Math.round(box.width)}x${Math.round(box.height)}`);
  },

  /** Text with a contrast below 4.5 to 1 (WCAG 2 AA). */
  faint() {
    const parse = (text) => (text.match(/[\d.]+/g) || []).map(Number);
    const linear = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const luminance = (rgb) => rgb.slice(0, 3).reduce((sum, value, at) => sum + linear(value / 255) * [0.2126, 0.7152, 0.0722][at], 0);
    const ground = (node) => {
      for (let at = node; at; at = at.parentElement) {
        const colour = parse(getComputedStyle(at).backgroundColor);
        if (colour.length === 3 || colour[3] > 0.99) return colour;
      }
      return [255, 255, 255];
    };
    const ratio = (node) => {
      const [light, dark] = [luminance(parse(getComputedStyle(node).color)), luminance(ground(node))].sort((a, b) => b - a);
      return (light + 0.05) / (dark + 0.05);
    };
    return [...document.querySelectorAll('.sy-chat *, .sy-topbar *')]
      .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
      .filter((node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !node.closest(':disabled, .katex'))
      .map((node) => [ratio(node), node.textContent.slice(0, 40)])
      .filter(([value]) => value < 4.5)
      .map(([value, text]) => `${text}: ${value.toFixed(2)}`);
  },

  /** Visible controls without an accessible name. */
  nameless() {
    const name = (node) =>
      node.getAttribute('aria-label') || node.textContent.trim() || node.title || node.labels?.length || node.getAttribute('aria-labelledby');
    return [...document.querySelectorAll('button, a[href], input:not([type=hidden]):not([hidden]), textarea, select')]
      .filter((node) => node.checkVisibility({ visibilityProperty: true }) && !name(node))
      .map((node) => node.outerHTML.slice(0, 160));
  },

  /** Ids that stand twice in the page. */
  doubled() {
    const ids = [...document.querySelectorAll('[id]')].map((node) => node.id).filter(Boolean);
    return ids.filter((id, at) => ids.indexOf(id) !== at);
  },

  /** Start to collect long tasks; `longest` reads them. */
  watchTasks() {
    window.__long = [0];
    new PerformanceObserver((list) => window.__long.push(...list.getEntries().map((entry) => entry.duration))).observe({ type: 'longtask' });
  },

  longest: () => Math.max(...window.__long),
})
