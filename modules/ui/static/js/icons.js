// Inline SVG icons, 24 × 24, stroked with the current colour. Drawn for this project.

const NS = 'http://www.w3.org/2000/svg';

// Each icon is a list of path data strings.
const PATHS = {
  menu: ['M4 7h16', 'M4 12h16', 'M4 17h16'],
  plus: ['M12 5v14', 'M5 12h14'],
  search: ['M11 4a7 7 0 1 0 0 14a7 7 0 1 0 0-14', 'M16.2 16.2L20.5 20.5'],
  send: ['M12 19V6', 'M6.5 11.5L12 6l5.500 5.500'],
  stop: ['M8 8h8v8H8z'],
  copy: ['M9 9h10v11H9z', 'M15 9V4H5v11h4'],
  check: ['M5 12.500l4.500 4.500L19 7.500'],
  refresh: ['M19.500 12a7.500 7.500 0 1 1-2.300-5.400', 'M19.500 3.500v4h-4'],
  forward: ['M5 6l7 6l-7 6z', 'M13 6l7 6l-7 6z'],
  edit: ['M5 19l1-4L16.500 4.500l3 3L9 18z', 'M14.500 6.500l3 3'],
  trash: ['M5 7h14', 'M9.500 7V4.500h5V7', 'M7 7l1 13h8l1-13', 'M10.500 11v5', 'M13.500 11v5'],
  branch: ['M7 4v16', 'M7 13c0-5 10-2 10-8', 'M15 7l2-2.500L19 7'],
  left: ['M14 6l-6 6l6 6'],
  right: ['M10 6l6 6l-6 6'],
  down: ['M12 5v13', 'M6.500 12.500L12 18l5.500-5.500'],
  chevron: ['M6 9.500l6 6l6-6'],
  close: ['M6 6l12 12', 'M18 6L6 18'],
  more: ['M5.500 12h.01', 'M12 12h.01', 'M18.500 12h.01'],
  pin: ['M9 4h6l-1 6l3 3H7l3-3z', 'M12 13v7'],
  chat: ['M4 5h16v11H11l-4.500 4v-4H4z'],
  cube: ['M12 3.500l7.500 4.250v8.500L12 20.500l-7.500-4.250v-8.500z', 'M4.500 7.750L12 12l7.500-4.250', 'M12 12v8.500'],
  sliders: ['M4 7h9', 'M17 7h3', 'M15 5v4', 'M4 12h3', 'M11 12h9', 'M9 10v4', 'M4 17h10', 'M18 17h2', 'M16 15v4'],
  gear: ['M12 9a3 3 0 1 0 0 6a3 3 0 1 0 0-6', 'M12 3.500v3', 'M12 17.500v3', 'M3.500 12h3', 'M17.500 12h3', 'M6 6l2.100 2.100', 'M15.900 15.900L18 18', 'M18 6l-2.100 2.100', 'M8.100 15.900L6 18'],
  sun: ['M12 8.500a3.500 3.500 0 1 0 0 7a3.500 3.500 0 1 0 0-7', 'M12 3v2', 'M12 19v2', 'M3 12h2', 'M19 12h2', 'M5.600 5.600l1.400 1.400', 'M17 17l1.400 1.400', 'M18.400 5.600L17 7', 'M7 17l-1.400 1.400'],
  moon: ['M19.500 14.500A8 8 0 0 1 9.500 4.500a8 8 0 1 0 10 10z'],
  system: ['M4 5h16v11H4z', 'M9 20h6', 'M12 16v4'],
  keyboard: ['M3.500 7h17v10h-17z', 'M7 10.500h.01', 'M10.500 10.500h.01', 'M14 10.500h.01', 'M17 10.500h.01', 'M8 14h8'],
  download: ['M12 4v11', 'M7 10.500l5 5l5-5', 'M5 20h14'],
  upload: ['M12 16V5', 'M7 9.500l5-5l5 5', 'M5 20h14'],
  info: ['M12 4a8 8 0 1 0 0 16a8 8 0 1 0 0-16', 'M12 11v5', 'M12 8h.01'],
  warning: ['M12 4.500l8.500 15h-17z', 'M12 10.500v4', 'M12 17h.01'],
  power: ['M12 4v8', 'M7.500 7a7 7 0 1 0 9 0'],
  eject: ['M12 6l6.500 8h-13z', 'M5.500 18h13'],
  image: ['M4 5h16v14H4z', 'M4 16l5-5l4 4l3-2.500l4 3.500', 'M15.500 9h.01'],
  gauge: ['M4.500 17.500a8.500 8.500 0 1 1 15 0', 'M12 14l4-5', 'M12 13.500h.01'],
  layers: ['M12 4l8.500 4.500L12 13L3.500 8.500z', 'M4.500 12.500L12 16.500l7.500-4', 'M4.500 16L12 20l7.500-4'],
  batch: ['M4.500 5.500l1.500 1.500l2.500-3', 'M12 6h8', 'M4.500 11.500l1.500 1.500l2.500-3', 'M12 12h8', 'M5 18h3', 'M12 18h8'],
  text: ['M5 6h14', 'M5 11h14', 'M5 16h9'],
  undo: ['M8.500 5L4.500 9l4 4', 'M4.500 9h9a5.500 5.500 0 0 1 0 11H8'],
};

export function icon(name, size = 20) {
  const svg = document.createElementNS(NS, 'svg');
  for (const [key, value] of Object.entries({
    viewBox: '0 0 24 24', width: size, height: size, fill: 'none', stroke: 'currentColor', 'stroke-width': 1.8,
    'stroke-linecap': 'round', 'stroke-linejoin': 'round', 'aria-hidden': 'true', focusable: 'false', class: 'sy-icon',
  })) svg.setAttribute(key, value);
  for (const data of PATHS[name]) {
    const path = document.createElementNS(NS, 'path');
    path.setAttribute('d', data);
    svg.append(path);
  }
  if (name === 'more') svg.setAttribute('stroke-width', 3);
  return svg;
}

/** The logo: a railway switch, one track that parts into two, with the set route in the accent colour. */
export function logo(size = 28) {
  const svg = document.createElementNS(NS, 'svg');
  for (const [key, value] of Object.entries({
    viewBox: '0 0 32 32', width: size, height: size, fill: 'none', 'stroke-linecap': 'round', 'aria-hidden': 'true', class: 'sy-logo',
  })) svg.setAttribute(key, value);
  const draw = (d, cls, width) => {
    const path = document.createElementNS(NS, 'path');
    path.setAttribute('d', d);
    path.setAttribute('class', cls);
    path.setAttribute('stroke-width', width);
    svg.append(path);
  };
  draw('M4 22H28', 'sy-logo-rail', 3.2);
  draw('M4 22C14 22 15 9 28 9', 'sy-logo-route', 3.2);
  const lamp = document.createElementNS(NS, 'circle');
  for (const [key, value] of Object.entries({ cx: 9, cy: 10, r: 3, class: 'sy-logo-lamp' })) lamp.setAttribute(key, value);
  svg.append(lamp);
  return svg;
}
