import { ERRNO } from '../../uapi.ts';
import type { Result } from '../kernel.ts';
import { OpenFile } from '../state.ts';

interface Message {
  readonly bytes: Uint8Array;
  readonly files: readonly OpenFile[];
}

/** By name: the sockets of every software kernel of this thread. Nothing is made in the host's file system. */
const bound = new Map<string, SocketFile>();

/** A Unix socket that keeps the borders of messages: SOCK_SEQPACKET or SOCK_DGRAM. */
export class SocketFile extends OpenFile {
  readonly type: number;
  readonly pageSize: number;
  readonly #connects: boolean;
  readonly #queue: Message[] = [];
  /** Ends of connections that nobody has accepted. */
  readonly #waiting: SocketFile[] = [];
  #name: string | null = null;
  #listens = false;
  #peer: SocketFile | null = null;
  /** Nobody has it any more. */
  gone = false;

  /** @param connects SOCK_SEQPACKET. @param pageSize Of the kernel it belongs to: files of another page size mean nothing there. */
  constructor(type: number, connects: boolean, pageSize: number) {
    super('socket');
    this.type = type;
    this.pageSize = pageSize;
    this.#connects = connects;
  }

  /** @returns whether there was one. */
  static unlink(name: string): boolean {
    return bound.delete(name);
  }

  bind(name: string): Result {
    if (this.#name !== null) return -ERRNO.EINVAL;
    if (bound.has(name)) return -ERRNO.EADDRINUSE;
    bound.set(name, this);
    this.#name = name;
    return 0;
  }

  listen(): Result {
    if (!this.#connects) return -ERRNO.EOPNOTSUPP;
    if (this.#name === null) return -ERRNO.EINVAL;
    this.#listens = true;
    return 0;
  }

  connect(name: string): Result {
    const target = bound.get(name);
    if (!target) return -ERRNO.ENOENT;
    if (target.type !== this.type) return -ERRNO.EPROTOTYPE;
    if (this.#connects && (this.#peer || this.#listens)) return -ERRNO.EISCONN;
    if (target.pageSize !== this.pageSize || (this.#connects && !target.#listens)) return -ERRNO.ECONNREFUSED;
    if (!this.#connects) {
      this.#peer = target;
      return 0;
    }
    const other = new SocketFile(this.type, true, this.pageSize).hold();
    other.#peer = this;
    this.#peer = other;
    target.#waiting.push(other);
    return 0;
  }

  /** The end of a connection, for the caller to drop; or -errno. */
  accept(): SocketFile | Result {
    if (!this.#listens) return -ERRNO.EINVAL;
    return this.#waiting.shift() ?? -ERRNO.EAGAIN;
  }

  send(bytes: Uint8Array, files: readonly OpenFile[]): Result {
    if (!this.#peer) return -ERRNO.ENOTCONN;
    if (this.#peer.gone) return -(this.#connects ? ERRNO.EPIPE : ERRNO.ECONNREFUSED);
    this.#peer.#queue.push({ bytes: bytes.slice(), files: files.map((file) => file.hold()) });
    return bytes.length;
  }

  /** The files are for the caller to drop. */
  receive(): Message | Result {
    const message = this.#queue.shift();
    if (message) return message;
    if (this.#connects && !this.#peer) return -ERRNO.ENOTCONN;
    return this.#hasEnded ? 0 : -ERRNO.EAGAIN;
  }

  get readable(): boolean {
    return this.#queue.length > 0 || this.#waiting.length > 0 || this.#hasEnded;
  }

  get #hasEnded(): boolean {
    return this.#connects && this.#peer?.gone === true;
  }

  protected override released(): void {
    this.gone = true;
    if (this.#name !== null && bound.get(this.#name) === this) bound.delete(this.#name);
    for (const { files } of this.#queue.splice(0)) for (const file of files) file.drop();
    for (const end of this.#waiting.splice(0)) end.drop();
  }
}
