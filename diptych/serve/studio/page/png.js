// Pictures as bytes: PNG files that carry how they were made in a text chunk, and back.

const KEYWORD = "diptych";

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k += 1) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});

function crc(bytes) {
  let c = 0xffffffff;
  for (const byte of bytes) c = TABLE[(c ^ byte) & 255] ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}

/** JSON in Latin-1, as text chunks want it. */
const ascii = (value) => JSON.stringify(value).replace(/[^\x20-\x7e]/g,
  (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** The picture with `value` in a tEXt chunk behind its header. */
export async function withRecipe(blob, value) {
  const file = new Uint8Array(await blob.arrayBuffer());
  const data = new TextEncoder().encode(`tEXt${KEYWORD}\0${ascii(value)}`);
  const chunk = new Uint8Array(data.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, data.length - 4);
  chunk.set(data, 4);
  view.setUint32(data.length + 4, crc(data));
  const head = 33; // signature and IHDR
  return new Blob([file.subarray(0, head), chunk, file.subarray(head)], { type: "image/png" });
}

/** What `withRecipe` wrote, or null. */
export async function recipeOf(blob) {
  const file = new Uint8Array(await blob.arrayBuffer());
  const view = new DataView(file.buffer);
  for (let at = 8; at + 12 <= file.length;) {
    const length = view.getUint32(at);
    const words = new TextDecoder("latin1").decode(file.subarray(at + 4, at + 8 + KEYWORD.length + 1));
    if (words === `tEXt${KEYWORD}\0`) {
      return JSON.parse(new TextDecoder("latin1").decode(file.subarray(at + 9 + KEYWORD.length, at + 8 + length)));
    }
    at += 12 + length;
  }
  return null;
}

export function blobOf(base64, type = "image/png") {
  return new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type });
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

export const ofDataUrl = (url) => blobOf(url.slice(url.indexOf(",") + 1), url.slice(5, url.indexOf(";")));

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
