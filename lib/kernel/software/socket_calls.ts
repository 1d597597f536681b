import { bytes, i32, text } from '../arguments.ts';
import type { Result } from '../kernel.ts';
import type { OpenFile } from '../state.ts';
import { FileCalls } from './file_calls.ts';
import { SocketFile } from './socket_file.ts';

const SOCK_DGRAM = 2;
const SOCK_SEQPACKET = 5;
/** As many as one message of this boundary carries. */
const MESSAGE_FDS = 32;
const PATH_MAX = 107;

/** The system calls on Unix sockets. */
export abstract class SocketCalls extends FileCalls {
  socket(type: number): Result {
    const wanted = i32('type', type);
    return wanted === SOCK_DGRAM || wanted === SOCK_SEQPACKET
      ? this.install(() => new SocketFile(wanted, wanted === SOCK_SEQPACKET, this.pageSize))
      : this.refuse('EPROTONOSUPPORT', 'the software kernel has SOCK_SEQPACKET and SOCK_DGRAM');
  }

  bind(fd: number, path: string): Result {
    return this.#named(fd, path, (socket, name) => socket.bind(name));
  }

  listen(fd: number, backlog: number): Result {
    i32('backlog', backlog);
    const socket = this.#socket(fd);
    return typeof socket === 'number' ? socket : this.answer(socket.listen());
  }

  accept4(fd: number): Result {
    const socket = this.#socket(fd);
    if (typeof socket === 'number') return socket;
    const refused = this.noFreeFd();
    if (refused !== null) return refused;
    const accepted = socket.accept();
    if (typeof accepted === 'number') return this.answer(accepted);
    const result = this.install(() => accepted);
    accepted.drop();
    return result;
  }

  connect(fd: number, path: string): Result {
    return this.#named(fd, path, (socket, name) => socket.connect(name));
  }

  sendmsg(fd: number, source: Uint8Array, fds: readonly number[]): Result {
    const [plain, given] = [bytes('source', source), Array.from(fds, (each) => i32('fds', each))];
    const socket = this.#socket(fd);
    if (typeof socket === 'number') return socket;
    if (given.length > MESSAGE_FDS) return this.refuse('EINVAL', `a message has at most ${MESSAGE_FDS} fds`);
    const files: OpenFile[] = [];
    for (const each of given) {
      const file = this.file(each);
      if (!file) return this.badFd(each);
      files.push(file);
    }
    return this.answer(socket.send(plain, files));
  }

  recvmsg(fd: number, target: Uint8Array, fds: number[]): Result {
    const plain = bytes('target', target);
    const socket = this.#socket(fd);
    if (typeof socket === 'number') return socket;
    fds.length = 0;
    const message = socket.receive();
    if (typeof message === 'number') return this.answer(message);
    const fits = message.bytes.length <= plain.length;
    if (fits) {
      plain.set(message.bytes);
      for (const file of message.files) fds.push(this.install(() => file));
    }
    for (const file of message.files) file.drop();
    return fits ? message.bytes.length : this.refuse('EMSGSIZE', 'the message is longer than the buffer');
  }

  unlink(path: string): Result {
    return SocketFile.unlink(text('path', path)) ? 0 : this.refuse('ENOENT', `no socket has the name ${path}`);
  }

  #named(fd: number, path: string, call: (socket: SocketFile, name: string) => Result): Result {
    const name = text('path', path);
    const socket = this.#socket(fd);
    if (typeof socket === 'number') return socket;
    if (name === '') return this.refuse('EINVAL', 'a socket needs a name');
    if (Buffer.byteLength(name) > PATH_MAX) return this.refuse('ENAMETOOLONG', `${PATH_MAX} bytes at most`);
    return this.answer(call(socket, name));
  }

  #socket(fd: number): SocketFile | Result {
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    return file instanceof SocketFile ? file : this.refuse('ENOTSOCK', 'not a socket');
  }
}
