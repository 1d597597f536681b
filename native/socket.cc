// Unix sockets, and file descriptors that travel over them.

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

#include "calls.h"
#include "syscall.h"

namespace {

// As many as the words of a command leave room for.
constexpr size_t kFds = 32;

// A leading @ is the abstract namespace, as in $NOTIFY_SOCKET. The length, or -errno.
int64_t ToAddress(const char* path, sockaddr_un* address) {
  const size_t length = std::strlen(path);
  if (length == 0) return -EINVAL;
  if (length >= sizeof address->sun_path) return -ENAMETOOLONG;
  address->sun_family = AF_UNIX;
  std::memcpy(address->sun_path, path, length);
  if (path[0] == '@') address->sun_path[0] = '\0';
  return static_cast<int64_t>(offsetof(sockaddr_un, sun_path) + length + (path[0] == '@' ? 0 : 1));
}

int64_t WithAddress(Environment& environment, const char* path, long number) {
  sockaddr_un address = {};
  const int64_t length = ToAddress(path, &address);
  return length < 0 ? length : Syscall(number, environment.command().i32(0), &address, length);
}

// socket(2) of AF_UNIX, close-on-exec, whose calls do not wait. command: [type]
int64_t Socket(Environment& environment) {
  return environment.Own(Syscall(SYS_socket, AF_UNIX, environment.command().i32(0) | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
}

// bind(2). command: [fd]
int64_t Bind(Environment& environment, const char* path) { return WithAddress(environment, path, SYS_bind); }

// connect(2). command: [fd]
int64_t Connect(Environment& environment, const char* path) { return WithAddress(environment, path, SYS_connect); }

// listen(2). command: [fd, backlog]
int64_t Listen(const Command& command) { return Syscall(SYS_listen, command.i32(0), command.i32(1)); }

// accept4(2), close-on-exec, whose calls do not wait. command: [fd]
int64_t Accept4(Environment& environment) {
  return environment.Own(
      Syscall(SYS_accept4, environment.command().i32(0), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

// sendmsg(2), with SCM_RIGHTS when there are fds. command: [fd, count, fds…]
int64_t Sendmsg(const Command& command, Bytes source) {
  const size_t count = command.u64(1);
  if (count > kFds) return -EINVAL;
  alignas(cmsghdr) char control[CMSG_SPACE(kFds * sizeof(int))] = {};
  iovec part = {source.data, source.size};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (count > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(count * sizeof(int));
    for (size_t index = 0; index < count; index++) {
      const int fd = command.i32(2 + index);
      std::memcpy(CMSG_DATA(header) + index * sizeof(int), &fd, sizeof fd);
    }
  }
  return Syscall(SYS_sendmsg, command.i32(0), &message, MSG_NOSIGNAL);
}

// recvmsg(2), close-on-exec; a message that does not fit is -EMSGSIZE and gone. command: [fd]; then words: [count,
// fds…]
int64_t Recvmsg(Environment& environment, Bytes target) {
  const Command& command = environment.command();
  alignas(cmsghdr) char control[CMSG_SPACE(kFds * sizeof(int))] = {};
  iovec part = {target.data, target.size};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const int64_t result = Syscall(SYS_recvmsg, command.i32(0), &message, MSG_CMSG_CLOEXEC);
  size_t count = 0;
  if (result < 0) return result;
  const bool whole = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t fds = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t index = 0; index < fds; index++) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + index * sizeof(int), sizeof fd);
      if (!whole || count == kFds) {
        close(fd);
      } else {
        command.Set(1 + count++, static_cast<uint64_t>(environment.Own(fd)));
      }
    }
  }
  command.Set(0, count);
  return whole ? result : -EMSGSIZE;
}

constexpr Function kTable[] = {
    {"socket", Invoke<Socket>},   {"bind", Invoke<Bind>},       {"connect", Invoke<Connect>},
    {"listen", Invoke<Listen>},   {"accept4", Invoke<Accept4>}, {"sendmsg", Invoke<Sendmsg>},
    {"recvmsg", Invoke<Recvmsg>},
};

}  // namespace

const Functions kSocket = kTable;
