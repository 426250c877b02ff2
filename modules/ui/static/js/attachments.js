// Images that go with a message: picked, pasted or dropped, shown above the box until they are sent.

import { post } from './api.js';
import { h } from './dom.js';
import { icon } from './icons.js';
import { activeResident, modelName, watchModels } from './models.js';
import { fail, toast } from './toast.js';

const KINDS = ['image/png', 'image/jpeg', 'image/webp', 'image/gif'];
const MOST_BYTES = 20 * 1024 * 1024;
const MOST_IMAGES = 16;

async function base64(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = '';
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

/** What a reference may hold as a name: no brackets, no line breaks. */
const plainName = (name) => (name || 'image').replace(/[[\]()\\\n\r]/g, ' ').trim().slice(0, 100) || 'image';

export class Attachments {
  constructor() {
    this.files = [];
    this.picker = h('input', {
      type: 'file', accept: KINDS.join(','), multiple: true, hidden: true, 'data-testid': 'attach-file',
      onchange: () => {
        this.add(this.picker.files);
        this.picker.value = '';
      },
    });
    this.button = h(
      'button',
      { type: 'button', class: 'sy-attach', 'aria-label': 'Attach an image', title: 'Attach an image', 'data-testid': 'attach', onclick: () => this.picker.click() },
      icon('image', 20),
    );
    this.note = h('p', { role: 'status', 'data-testid': 'attach-note' });
    this.element = h('div', { class: 'sy-attached', hidden: true, 'data-testid': 'attached' });
    watchModels(() => this.#say());
  }

  get count() {
    return this.files.length;
  }

  /** Also take what is dropped on `area`'s form or pasted into it. */
  takeFrom(form, area) {
    form.addEventListener('dragover', (event) => {
      if (event.dataTransfer?.types.includes('Files')) event.preventDefault();
    });
    form.addEventListener('drop', (event) => {
      if (!event.dataTransfer?.files.length) return;
      event.preventDefault();
      this.add(event.dataTransfer.files);
    });
    area.addEventListener('paste', (event) => {
      const images = [...(event.clipboardData?.files || [])].filter((file) => KINDS.includes(file.type));
      if (!images.length) return;
      event.preventDefault();
      this.add(images);
    });
  }

  add(files) {
    for (const file of files) {
      if (!KINDS.includes(file.type)) toast(`${file.name} is no image that can be sent: PNG, JPEG, WebP and GIF can.`, { level: 'warning' });
      else if (file.size > MOST_BYTES) toast(`${file.name} is larger than 20 MB.`, { level: 'warning' });
      else if (this.files.length >= MOST_IMAGES) toast(`A message takes ${MOST_IMAGES} images.`, { level: 'warning' });
      else this.files.push({ file, name: null, preview: URL.createObjectURL(file) });
    }
    this.#draw();
  }

  /** Keep the images on the server; their references for the message's text, or null after an error was shown. Also those of an
   *  earlier try: the server keeps what no message refers to for an hour only. */
  async keep() {
    try {
      for (const entry of this.files) entry.name = (await post('attachments', { image: await base64(entry.file) })).name;
    } catch (error) {
      fail(error);
      return null;
    }
    return this.files.map((entry) => `![${plainName(entry.file.name)}](cid:${entry.name})`);
  }

  clear() {
    for (const entry of this.files) URL.revokeObjectURL(entry.preview);
    this.files = [];
    this.#draw();
  }

  #remove(entry) {
    URL.revokeObjectURL(entry.preview);
    this.files = this.files.filter((other) => other !== entry);
    this.#draw();
  }

  #draw() {
    this.element.hidden = !this.files.length;
    this.element.replaceChildren(
      ...this.files.map((entry) =>
        h(
          'figure',
          {},
          h('img', { src: entry.preview, alt: plainName(entry.file.name) }),
          h('button', { type: 'button', 'aria-label': `Remove ${plainName(entry.file.name)}`, onclick: () => this.#remove(entry) }, icon('close', 14)),
        ),
      ),
      this.note,
    );
    this.#say();
  }

  /** Whether the loaded model will see them. */
  #say() {
    const resident = activeResident();
    const blind = resident?.state === 'ready' && !resident.info?.image_token;
    const why = resident?.info?.no_images ? ` ${resident.info.no_images}` : '';
    this.note.textContent = blind ? `${modelName(resident)} reads no images: it will only get the words.${why}` : '';
  }
}
