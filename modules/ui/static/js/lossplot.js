// Loss per layer of a quantisation, on a logarithmic scale, as the layers come in.

const NS = 'http://www.w3.org/2000/svg';
const WIDTH = 640;
const HEIGHT = 220;
const [LEFT, RIGHT, TOP, BOTTOM] = [58, 12, 12, 34];
const COLOURS = ['#0b6e5b', '#b45f06', '#3b5bbd', '#a23b72', '#5d7f17', '#7a4fbf', '#b3261e', '#1f7a8c'];

function node(name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const short = (layer) => layer.split('.').pop();

/** `losses` are [block, layer, loss]; `blocks` is how many there will be. */
export function lossPlot(losses, blocks) {
  const svg = node('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', class: 'sy-plot', 'font-size': 12, fill: 'var(--sy-text)', 'data-testid': 'loss-plot' });
  const seen = losses.filter(([, , loss]) => loss > 0);
  svg.append(node('title', {}, `Loss of ${losses.length} layers`));
  if (!seen.length) return svg;
  const logs = seen.map(([, , loss]) => Math.log10(loss));
  const low = Math.floor(Math.min(...logs));
  const high = Math.max(Math.ceil(Math.max(...logs)), low + 1);
  const last = Math.max(blocks, ...seen.map(([block]) => block), 1);
  const across = (block) => LEFT + ((block - 0.5) / last) * (WIDTH - LEFT - RIGHT);
  const down = (log) => HEIGHT - BOTTOM - ((log - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  for (let power = low; power <= high; power += 1) {
    svg.append(node('line', { x1: LEFT, x2: WIDTH - RIGHT, y1: down(power), y2: down(power), stroke: 'var(--sy-line)' }));
    svg.append(node('text', { x: LEFT - 8, y: down(power) + 4, 'text-anchor': 'end', fill: 'var(--sy-muted)' }, power === 0 ? '1' : power > -3 ? String(10 ** power) : `1e${power}`));
  }
  const step = Math.max(1, Math.ceil(last / 12));
  for (let block = 1; block <= last; block += step) svg.append(node('text', { x: across(block), y: HEIGHT - BOTTOM + 16, 'text-anchor': 'middle', fill: 'var(--sy-muted)' }, block));
  svg.append(node('text', { x: (WIDTH + LEFT) / 2, y: HEIGHT - 4, 'text-anchor': 'middle', fill: 'var(--sy-muted)' }, 'Block'));
  const names = [...new Set(seen.map(([, layer]) => short(layer)))];
  for (const [at, name] of names.entries()) {
    const colour = COLOURS[at % COLOURS.length];
    const points = seen.filter(([, layer]) => short(layer) === name).map(([block, layer, loss]) => [across(block), down(Math.log10(loss)), block, layer, loss]);
    if (points.length > 1) svg.append(node('polyline', { points: points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(' '), fill: 'none', stroke: colour, 'stroke-width': 1.5 }));
    for (const [x, y, block, layer, loss] of points) {
      const dot = node('circle', { cx: x, cy: y, r: 3.2, fill: colour });
      dot.append(node('title', {}, `Block ${block}, ${layer}: ${loss.toExponential(2)}`));
      svg.append(dot);
    }
  }
  return svg;
}

/** The names of the layers in their colours. */
export function lossLegend(losses) {
  const names = [...new Set(losses.map(([, layer]) => short(layer)))];
  const list = document.createElement('ul');
  list.className = 'sy-legend';
  for (const [at, name] of names.entries()) {
    const item = document.createElement('li');
    const dot = document.createElement('i');
    dot.style.background = COLOURS[at % COLOURS.length];
    item.append(dot, name);
    list.append(item);
  }
  return list;
}
