// The server's /ui-api: JSON requests and the page-wide event stream.

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message || `The server answered ${status}.`);
    this.status = status;
    this.code = error.code || 'unknown';
    this.param = error.param || null;
    this.detail = error.detail || null;
  }
}

export const url = (path) => new URL(path.replace(/^\//, ''), document.baseURI).href;

/** Where the server has an image that messages refer to as `cid:NAME`. */
export const attachmentUrl = (name) => url(`ui-api/attachments/${name}`);

export async function api(method, path, body) {
  let response;
  try {
    response = await fetch(url(`ui-api/${path}`), {
      method,
      headers: body === undefined ? {} : { 'Content-Type': 'application/json' },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new ApiError(0, { code: 'offline', message: 'Switchyard does not answer. Is the server still running?' });
  }
  const text = await response.text();
  let data = null;
  try {
    data = text ? JSON.parse(text) : null;
  } catch {
    throw new ApiError(response.status, { message: `The server sent something that is not JSON (${response.status}).` });
  }
  if (!response.ok) throw new ApiError(response.status, data?.error || {});
  return data;
}

export const get = (path) => api('GET', path);
export const post = (path, body = {}) => api('POST', path, body);
export const patch = (path, body) => api('PATCH', path, body);
export const put = (path, body) => api('PUT', path, body);
export const del = (path) => api('DELETE', path);

/** Whether `view` is older than what is `known`: a reply can come after the events that followed it. */
export const overtaken = (view, known) => Boolean(known && view.revision < known.revision);

// --- page-wide events ---------------------------------------------------------------------------------------------

const listeners = new Map();
const KINDS = ['models', 'conversation', 'conversations', 'notice', 'install', 'settings', 'presets', 'evaluation', 'quantization', 'batch', 'download', 'conversion', 'remotes', 'library', 'resync', 'online', 'offline'];

/** Call `fn(data)` on each event of `kind`; `resync` means that events were missed and everything should be read again. */
export function on(kind, fn) {
  if (!KINDS.includes(kind)) throw new Error(`no event is called ${kind}`);
  if (!listeners.has(kind)) listeners.set(kind, new Set());
  listeners.get(kind).add(fn);
  return () => listeners.get(kind).delete(fn);
}

export function emit(kind, data = {}) {
  for (const fn of listeners.get(kind) || []) fn(data);
}

let source = null;
let lost = false;
let closing = 0;

function open() {
  clearTimeout(closing);
  if (source) return;
  source = new EventSource(url('ui-api/events'));
  source.onopen = () => {
    if (lost) {
      lost = false;
      emit('online');
      emit('resync');
    }
  };
  source.onerror = () => {
    lost = true;
    emit('offline');
    // A browser gives up for good when the answer was an error page; try again by hand.
    if (source && source.readyState === EventSource.CLOSED) {
      source = null;
      setTimeout(open, 1500);
    }
  };
  for (const kind of KINDS) source.addEventListener(kind, (event) => emit(kind, event.data ? JSON.parse(event.data) : {}));
}

/** A browser allows six connections to one host: a tab in the background gives its streams back after a while. */
export function connect() {
  if (source) return;
  open();
  document.addEventListener('visibilitychange', () => {
    if (document.hidden) {
      closing = setTimeout(() => {
        source?.close();
        source = null;
      }, 20_000);
    } else if (!source) {
      open();
      emit('resync');
    } else clearTimeout(closing);
  });
}
