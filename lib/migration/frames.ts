import type { Duplex } from 'node:stream';
import { KvmError } from '../errors.ts';

/** What the two sides of a migration say: a type, a length, and that many bytes. Numbers are little-endian. */
export const FRAME = {
  /** The memory image, as JSON. */
  image: 1,
  /** Bytes of a memory: its index, its offset (64 bits), then the bytes. */
  pages: 2,
  /** What is to come by post-copy, as JSON. */
  missing: 3,
  /** The user's data: the end. */
  state: 4,
  /** The other side has it all. */
  ready: 5,
  /** Of a page server: index, offset, and how many bytes. */
  ask: 6,
  /** Its answer where all is zeros; else `pages`. */
  zeros: 7,
} as const;

const HEAD = 8;
export const PAGES_HEAD = 16;
/** No frame of ours is longer, so a longer one is no frame. */
const LONGEST = 1 << 28;

export interface Frame {
  readonly type: number;
  readonly payload: Uint8Array;
}

/** Resolves when the stream has taken it. */
export function send(stream: Duplex, type: number, ...parts: readonly Uint8Array[]): Promise<void> {
  const length = parts.reduce((sum, part) => sum + part.length, 0);
  const frame = Buffer.alloc(HEAD + length);
  frame.writeUInt32LE(type, 0);
  frame.writeUInt32LE(length, 4);
  let at = HEAD;
  for (const part of parts) {
    frame.set(part, at);
    at += part.length;
  }
  return new Promise((resolve, reject) => {
    stream.write(frame, (error) => (error ? reject(lost(error)) : resolve()));
  });
}

export function pagesHead(memory: number, offset: number, size: number): Uint8Array {
  const head = Buffer.alloc(PAGES_HEAD);
  head.writeUInt32LE(memory, 0);
  head.writeUInt32LE(size, 4);
  head.writeBigUInt64LE(BigInt(offset), 8);
  return head;
}

export function readPagesHead(payload: Uint8Array): { memory: number; offset: number; size: number } {
  if (payload.length < PAGES_HEAD) throw wrong('a frame is too short');
  const head = Buffer.from(payload.buffer, payload.byteOffset, PAGES_HEAD);
  return { memory: head.readUInt32LE(0), size: head.readUInt32LE(4), offset: Number(head.readBigUInt64LE(8)) };
}

/** The frames that come, until the stream ends between two of them. It stays open. */
export async function* frames(stream: Duplex): AsyncGenerator<Frame, void, void> {
  const parts: Uint8Array[] = [];
  let length = 0;
  let head: { type: number; size: number } | null = null;
  const take = (size: number): Buffer => {
    const all = parts.length === 1 ? (parts[0] as Uint8Array) : Buffer.concat(parts.splice(0));
    parts.splice(0);
    if (all.length > size) parts.push(all.subarray(size));
    length -= size;
    return Buffer.from(all.buffer, all.byteOffset, size);
  };
  try {
    for await (const chunk of stream.iterator({ destroyOnReturn: false })) {
      if (!(chunk instanceof Uint8Array)) throw wrong('the stream does not carry bytes');
      parts.push(chunk);
      length += chunk.length;
      for (;;) {
        if (!head && length >= HEAD) {
          const words = take(HEAD);
          head = { type: words.readUInt32LE(0), size: words.readUInt32LE(4) };
          if (head.size > LONGEST) throw wrong('a frame is too long');
        }
        if (!head || length < head.size) break;
        const { type, size } = head;
        head = null;
        yield { type, payload: take(size) };
      }
    }
  } catch (error) {
    throw error instanceof KvmError ? error : lost(error);
  }
  if (head || length > 0) throw lost(new Error('it ended inside a frame'));
}

/** The next frame, which must be of this type. */
export async function next(source: AsyncGenerator<Frame, void, void>, type: number): Promise<Uint8Array> {
  const { value, done } = await source.next();
  if (done) throw lost(new Error('it ended early'));
  if (value.type !== type) throw wrong(`frame ${value.type} came where ${type} belongs`);
  return value.payload;
}

export function wrong(why: string): KvmError {
  return new KvmError({ code: 'EINVAL', message: `what came over the stream is no migration: ${why}` });
}

function lost(cause: unknown): KvmError {
  const why = cause instanceof Error ? cause.message : String(cause);
  return new KvmError({
    code: 'EPIPE',
    errno: -32,
    message: `the other side of the migration is lost: ${why} (EPIPE)`,
    cause,
  });
}
