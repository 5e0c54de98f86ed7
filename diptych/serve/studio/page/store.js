// What was made, kept in this browser (IndexedDB): the newest so many, and not more than so many bytes.

const NAME = "diptych-studio";
export const MOST = 120;
export const LARGEST = 48 * 2 ** 20; // bytes of all pictures together

let opened = null;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore("made", { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
  return opened;
}

async function within(mode, work) {
  const store = (await open()).transaction("made", mode).objectStore("made");
  return new Promise((resolve, reject) => {
    const asked = work(store);
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

/** Bytes of all blobs in a record. */
export function weight(value) {
  if (value instanceof Blob) return value.size;
  if (value === null || typeof value !== "object") return 0;
  return Object.values(value).reduce((sum, part) => sum + weight(part), 0);
}

/** Newest first. */
export async function all() {
  const records = await within("readonly", (store) => store.getAll());
  return records.sort((a, b) => b.made - a.made);
}

export const drop = (id) => within("readwrite", (store) => store.delete(id));
export const clear = () => within("readwrite", (store) => store.clear());

/** Keeps a record; what no longer fits goes, the oldest first. A browser that stores nothing loses it with the page,
 *  which the history says. */
export async function keep(record) {
  try {
    await within("readwrite", (store) => store.put({ ...record, weight: weight(record) }));
    let bytes = 0;
    for (const [place, old] of (await all()).entries()) {
      bytes += old.weight;
      if (place >= MOST || (bytes > LARGEST && place > 0)) await drop(old.id);
    }
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
  }
}

export const newId = () => crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
