// Lets a wheel that is built with a recent glibc run with any since 2.28, for which torch's own wheels are made.
//
// A linker takes the newest version of each function of the C library, which an older one does not have. Here are
// functions of the same names that jump to the version of glibc 2.2.5, which all later ones have too. They are hidden:
// they serve this extension alone, and the CUDA runtime that is linked into it. With GROUPDETR_FAST_OLD_GLIBC only.
#ifdef GROUPDETR_FAST_OLD_GLIBC

#define VERSION_OF(name, version)                                                  \
  __asm__(".symver old_" #name "," #name "@GLIBC_" version                         \
          "\n"                                                                     \
          ".pushsection .text." #name                                              \
          ",\"ax\",@progbits\n"                                                    \
          ".globl " #name "\n.hidden " #name "\n.type " #name ",@function\n" #name \
          ":\n"                                                                    \
          "jmp *old_" #name                                                        \
          "@GOTPCREL(%rip)\n"                                                      \
          ".size " #name ",.-" #name "\n.popsection\n")
#define OLDEST(name) VERSION_OF(name, "2.2.5")

OLDEST(dlsym);
OLDEST(exp);

#ifdef USE_CUDA
OLDEST(dlclose);
OLDEST(dlerror);
VERSION_OF(dlmopen, "2.3.4");
OLDEST(dlopen);
OLDEST(dlvsym);
OLDEST(pthread_condattr_setpshared);
OLDEST(pthread_create);
OLDEST(pthread_detach);
OLDEST(pthread_getspecific);
OLDEST(pthread_join);
OLDEST(pthread_key_create);
OLDEST(pthread_key_delete);
OLDEST(pthread_kill);
OLDEST(pthread_mutex_trylock);
OLDEST(pthread_mutexattr_destroy);
OLDEST(pthread_mutexattr_init);
OLDEST(pthread_mutexattr_setpshared);
OLDEST(pthread_mutexattr_settype);
OLDEST(pthread_once);
OLDEST(pthread_rwlock_destroy);
OLDEST(pthread_rwlock_init);
OLDEST(pthread_rwlock_rdlock);
OLDEST(pthread_rwlock_timedrdlock);
OLDEST(pthread_rwlock_timedwrlock);
OLDEST(pthread_rwlock_tryrdlock);
OLDEST(pthread_rwlock_trywrlock);
OLDEST(pthread_rwlock_unlock);
OLDEST(pthread_rwlock_wrlock);
OLDEST(pthread_rwlockattr_destroy);
OLDEST(pthread_rwlockattr_init);
OLDEST(pthread_rwlockattr_setpshared);
OLDEST(pthread_setspecific);
OLDEST(pthread_spin_destroy);
OLDEST(pthread_spin_init);
OLDEST(pthread_spin_lock);
OLDEST(pthread_spin_trylock);
OLDEST(pthread_spin_unlock);
OLDEST(sem_destroy);
OLDEST(sem_init);
OLDEST(sem_post);
OLDEST(sem_timedwait);
OLDEST(sem_trywait);
OLDEST(sem_wait);
OLDEST(shm_open);
OLDEST(shm_unlink);
#endif

// libstdc++ reads this since glibc 2.32: whether the process has one thread, so that counters need not be atomic.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

#endif
